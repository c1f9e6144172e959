"""Builds the test extension, runs the cases under the fake GPU, then the deliberate mistakes: `make check`."""

import importlib.util
import itertools
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
# The Makefile sets these.
TOOLKIT, NVCC = os.environ["CUDA_TOOLKIT"], os.environ.get("NVCC", "nvcc")
LIBRARY = Path(os.environ["FAKEGPU_BUILD"]) / "libfakegpu.so"
BUILD = Path(os.environ["FAKEGPU_BUILD"]) / "tests"
EXTENSION = BUILD / ("fakegpu_test" + sysconfig.get_config_var("EXT_SUFFIX"))

PROGRAMS = [  # source, capabilities whose PTX it carries, arguments, settings
    ("breadth", "80", "", {}),
    ("libcu", "80", "", {}),
    ("libcu", "90", "", {}),
    ("devices", "75,80", "capability 75 75", {"FAKEGPU_SM": "75"}),
    ("devices", "75,80", "capability 80 80", {"FAKEGPU_SM": "80"}),
    ("devices", "75,80", "capability 90 80", {"FAKEGPU_SM": "90"}),
    ("devices", "75,80", "two", {"FAKEGPU_DEVICES": "2"}),
    ("devices", "75,80", "count 1", {}),
    ("devices", "75,80", "count 3", {"FAKEGPU_DEVICES": "4", "CUDA_VISIBLE_DEVICES": "0,2,1,7,3"}),
    ("devices", "75,80", "count 0", {"FAKEGPU_DEVICES": "4", "CUDA_VISIBLE_DEVICES": ""}),
    ("devices", "75,80", "count 0", {"CUDA_VISIBLE_DEVICES": "-1"}),
]

VIOLATION, UNSUPPORTED = 86, 87
MISTAKES = [  # name, text expected in the message, exit status
    ("0", "data race: shared", VIOLATION),
    ("1", "global memory out of bounds: read", VIOLATION),
    ("2", "global memory out of bounds: write", VIOLATION),
    ("3", "data race: shared", VIOLATION),
    ("4", "uninitialised shared memory read", VIOLATION),
    ("5", "barrier divergence", VIOLATION),
    ("6", "data race: global write", VIOLATION),
    ("7", "shared memory out of bounds", VIOLATION),
    ("8", "misaligned global access", VIOLATION),
    ("9", "shuffle from an inactive lane", VIOLATION),
    ("10", "data race: global read", VIOLATION),
    ("11", "data race: shared read", VIOLATION),
    ("12", "livelock", VIOLATION),
    ("13", "data race: global write", VIOLATION),
    ("14", "local memory out of bounds", VIOLATION),
    ("15", "barrier divergence", VIOLATION),
    ("16", "read-only path", VIOLATION),
    ("gemm1", "cp.async (not waited for)", VIOLATION),
    ("gemm2", "data race: shared", VIOLATION),
    ("freed", "global memory out of bounds", VIOLATION),
    ("host", "global memory out of bounds", VIOLATION),
    ("matmul", "has no PTX: not supported by the fake GPU", UNSUPPORTED),
]

passed = failed = 0


def result(ok: bool, name: str, why: str = "") -> None:
    global passed, failed
    passed += ok
    failed += not ok
    print(f"pass {name}" if ok else f"FAIL {name}: {why}", flush=True)


# ------------------------------------------------------------------------------------------ building


def newer(target: Path, *sources: Path) -> bool:
    return target.exists() and all(target.stat().st_mtime >= source.stat().st_mtime for source in sources)


def compile_if_older(target: Path, sources: list[Path], command: str) -> None:
    if not newer(target, *sources):
        subprocess.check_call([*command.split(), "-o", str(target)])


def program(name: str, capabilities: str) -> Path:
    return BUILD / f"{name}_{capabilities.replace(',', '_')}"


def ptx_only(capabilities: str) -> str:
    return " ".join(f"-gencode arch=compute_{c},code=compute_{c}" for c in capabilities.split(","))


def build() -> None:
    torch = Path(importlib.util.find_spec("torch").origin).parent  # without importing it
    major = "".join(
        c for c in subprocess.check_output([NVCC, "--version"], text=True).split("release ")[1][:2] if c.isdigit()
    )
    runtime = torch.parent / "nvidia" / f"cu{major}" / "lib"
    kernels, bindings = BUILD / "kernels.o", BUILD / "bindings.o"
    BUILD.mkdir(parents=True, exist_ok=True)
    compile_if_older(
        kernels,
        [HERE / "kernels.cu", HERE / "kernels.h"],
        f"{NVCC} -std=c++17 -O2 -lineinfo -w -Xcompiler -fPIC {ptx_only('80')} -c {HERE}/kernels.cu",
    )
    compile_if_older(
        bindings,
        [HERE / "bindings.cpp", HERE / "kernels.h"],
        f"g++ -std=c++20 -O1 -fPIC -DTORCH_EXTENSION_NAME=fakegpu_test -I{torch}/include "
        f"-I{torch}/include/torch/csrc/api/include -I{TOOLKIT}/include -I{sysconfig.get_paths()['include']} "
        f"-c {HERE}/bindings.cpp",
    )
    compile_if_older(
        EXTENSION,
        [kernels, bindings],
        f"g++ -shared {kernels} {bindings} -L{torch}/lib -lc10 -ltorch -ltorch_cpu -ltorch_python -lc10_cuda "
        f"-L{runtime} -l:libcudart.so.{major}",
    )
    for name, capabilities in sorted({(name, capabilities) for name, capabilities, _, _ in PROGRAMS}):
        compile_if_older(
            program(name, capabilities),
            [HERE / f"{name}.cu"],
            f"{NVCC} -std=c++17 -O2 -w --extended-lambda -cudart shared {ptx_only(capabilities)} {HERE}/{name}.cu "
            f"-Xlinker -rpath,{TOOLKIT}/lib64",
        )


# ------------------------------------------------------------------------------------------ running


def run(command: list[str], **settings: str) -> tuple[int, str, str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("FAKEGPU_", "CUDA_"))}
    environment.update(LD_PRELOAD=str(LIBRARY), PYTHONPATH=f"{BUILD}:{HERE.parent / 'python'}")
    environment.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")
    environment.update(settings)
    environment = {name: value for name, value in environment.items() if value != "unset"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    return done.returncode, done.stdout, done.stderr


def run_cases(names: list[str], file: str = "cases.py", **settings: str) -> tuple[int, str, str]:
    return run([sys.executable, str(HERE / file), *names], **settings)


def case_names(file: str = "cases.py") -> list[str]:
    lines = (HERE / file).read_text().splitlines()
    return [after[len("def ") :].split("(")[0] for line, after in itertools.pairwise(lines) if line == "@case"]


def results_of(output: str, label: str) -> None:
    for line in output.splitlines():
        if line.startswith(("PASS ", "FAIL ")):
            result(line.startswith("PASS"), f"{line[5:].split(':')[0]} [{label}]", line)


def check_cases() -> None:
    everything = case_names()
    # cub's decoupled look-back waits for earlier blocks: it needs the forward order.
    any_order = [name for name in everything if not name.startswith("cub_")]
    report = BUILD / "report.jsonl"
    for label, names, settings in (
        ("forward", everything, {}),
        ("reverse", any_order, {"FAKEGPU_ORDER": "reverse"}),
        ("random", any_order, {"FAKEGPU_ORDER": "random", "FAKEGPU_SEED": "3"}),
        ("caching allocator, sm_80", everything, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "unset", "FAKEGPU_SM": "80"}),
    ):
        report.unlink(missing_ok=True)
        status, out, err = run_cases(names, FAKEGPU_REPORT_FILE=str(report), FAKEGPU_DEVICES="2", **settings)
        results_of(out, label)
        result(status == 0, f"run [{label}]", f"exit status {status}\n{err[-1500:]}")
        check_report(report, label)
        if label == "forward":
            result("hello 5 world 1.50" in out, "device printf")


def check_report(report: Path, label: str) -> None:
    order = label if label in ("reverse", "random") else "forward"
    entries = [json.loads(line) for line in report.read_text().splitlines()]
    rows = {entry["kernel"].split("(")[0]: entry for entry in entries if entry["order"] == order}
    gemm, stencil = rows["void gemm_kernel<false, 0>"], rows["stencil_kernel"]
    good = gemm["mma_instructions"] > 0 and 0.5 < gemm["global_load_efficiency"] <= 1
    result(good and gemm["bank_conflict_factor"] < 1.3, f"report of the gemm [{label}]", str(gemm))
    result(stencil["launches"] == 3, f"report of launches [{label}]", str(stencil))
    shapes = {tuple(shape) for shape in stencil["shapes"]}
    result((3, 3, 1, 32, 16, 1, 0, 1) in shapes, f"report of shapes [{label}]", str(stencil["shapes"]))
    capability = 80 if "sm_80" in label else 90
    result(stencil["sm"] == capability, f"report of the capability [{label}]", str(stencil["sm"]))


def check_torch() -> None:
    names = [name for name in case_names("torch_cases.py") if name != "keep_going"]
    status, out, err = run_cases(names, "torch_cases.py", FAKEGPU_DEVICES="2")
    results_of(out, "fakegpu_torch")
    result(
        status == 0 and out.count("PASS") == len(names), "run [fakegpu_torch]", f"exit status {status}\n{err[-1500:]}"
    )


def check_programs() -> None:
    for name, capabilities, arguments, settings in PROGRAMS:
        label = f"{name} {arguments}, compute_{capabilities}"
        status, out, err = run([str(program(name, capabilities)), *arguments.split()], **settings)
        results_of(out, label)
        result(status == 0 and "PASS" in out, f"program [{label}]", err[-1000:])


def check_mistakes() -> None:
    for name, text, expected in MISTAKES:
        status, out, err = run_cases(["mistake:" + name], FAKEGPU_SPIN_LIMIT="1e6")
        caught = status == expected and text in err
        why = f"exit status {status}, expected {expected} and '{text}'\n{err[-700:]}{out[-200:]}"
        result(caught, f"caught: mistake {name}", why)
    devices = str(program("devices", "75,80"))
    status, out, err = run([devices, "other"], FAKEGPU_DEVICES="2")
    caught = status == VIOLATION and "access to another device's memory" in err
    result(caught, "caught: mistake of another device's memory", err)


def check_keep_going() -> None:
    log = BUILD / "log"
    log.unlink(missing_ok=True)
    status, out, err = run_cases(["mistake:1"], FAKEGPU_KEEP_GOING="1", FAKEGPU_LOG_FILE=str(log))
    result(status == VIOLATION and "64 violation(s)" in err, "FAKEGPU_KEEP_GOING counts", f"{status} {err[-500:]}")
    result("unspecified launch failure" in err, "FAKEGPU_KEEP_GOING fails the launch", err[-500:])
    result("VIOLATION global memory out of bounds" in log.read_text(), "FAKEGPU_LOG_FILE", log.read_text())
    status, out, err = run_cases(["keep_going"], "torch_cases.py", FAKEGPU_KEEP_GOING="1")
    results_of(out, "FAKEGPU_KEEP_GOING")
    result(status == 0, "exit status after reset violations", f"{status} {err[-500:]}")


if __name__ == "__main__":
    build()
    check_cases()
    check_torch()
    check_programs()
    check_mistakes()
    check_keep_going()
    print(f"{passed} passed, {failed} failed")
    sys.exit(failed != 0)
