"""Builds the test extension, runs the cases under the fake GPU, then the deliberate mistakes. `make check`."""
import json, os, subprocess, sys, sysconfig
HERE = os.path.dirname(os.path.abspath(__file__))
# The Makefile sets these three.
CUDA, NVCC = os.environ["CUDA_TOOLKIT"], os.environ.get("NVCC", "nvcc")
LIB = os.path.join(os.environ["FAKEGPU_BUILD"], "libfakegpu.so")
BUILD = os.path.join(os.environ["FAKEGPU_BUILD"], "tests")
PROGRAMS = [("breadth", "80"), ("libcu", "80"), ("libcu", "90")]   # plain programs and the PTX they carry
EXT = os.path.join(BUILD, "fakegpu_test" + sysconfig.get_config_var("EXT_SUFFIX"))

def newer(target, *sources):
    return os.path.exists(target) and all(os.path.getmtime(target) >= os.path.getmtime(s) for s in sources)

def build():
    import importlib.util
    torch = os.path.dirname(importlib.util.find_spec("torch").origin)   # without importing it
    cudart = os.path.join(os.path.dirname(torch), "nvidia", "cu13", "lib")
    os.makedirs(BUILD, exist_ok=True)
    src = lambda f: os.path.join(HERE, f)
    k, b = os.path.join(BUILD, "kernels.o"), os.path.join(BUILD, "bindings.o")
    if not newer(k, src("kernels.cu"), src("kernels.h")):
        subprocess.check_call([NVCC, "-std=c++17", "-O2", "-lineinfo", "-w", "-Xcompiler", "-fPIC", "-gencode", "arch=compute_80,code=compute_80", "-c", src("kernels.cu"), "-o", k])
    if not newer(b, src("bindings.cpp"), src("kernels.h")):
        subprocess.check_call(["g++", "-std=c++20", "-O1", "-fPIC", "-DTORCH_EXTENSION_NAME=fakegpu_test", f"-I{torch}/include", f"-I{torch}/include/torch/csrc/api/include",
                               f"-I{CUDA}/include", "-I" + sysconfig.get_paths()["include"], "-c", src("bindings.cpp"), "-o", b])
    for name, arch in PROGRAMS:
        if not newer(os.path.join(BUILD, name + arch), src(name + ".cu")):
            subprocess.check_call([NVCC, "-std=c++17", "-O2", "-w", "--extended-lambda", "-cudart", "shared", "-gencode", f"arch=compute_{arch},code=compute_{arch}",
                                   src(name + ".cu"), "-o", os.path.join(BUILD, name + arch), "-Xlinker", "-rpath," + CUDA + "/lib64"])
    if not newer(EXT, k, b):
        subprocess.check_call(["g++", "-shared", "-o", EXT, k, b, f"-L{torch}/lib", "-lc10", "-ltorch", "-ltorch_cpu", "-ltorch_python", "-lc10_cuda", f"-L{cudart}", "-l:libcudart.so.13"])

def run(args, **env):
    e = dict(os.environ, LD_PRELOAD=LIB, PYTHONPATH=BUILD, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    e.update(env)
    p = subprocess.run([sys.executable, os.path.join(HERE, "cases.py"), *args], env=e, capture_output=True, text=True, timeout=600)
    return p.returncode, p.stdout, p.stderr

# name, text expected in the message, exit status
MISTAKES = [("0", "data race: shared", 86), ("1", "global memory out of bounds: read", 86), ("2", "global memory out of bounds: write", 86),
            ("3", "data race: shared", 86), ("4", "uninitialised shared memory read", 86), ("5", "barrier divergence", 86),
            ("6", "data race: global write", 86), ("7", "shared memory out of bounds", 86), ("8", "misaligned global access", 86),
            ("9", "shuffle from an inactive lane", 86), ("10", "data race: global read", 86), ("11", "data race: shared read", 86),
            ("12", "livelock", 86), ("13", "data race: global write", 86), ("14", "local memory out of bounds", 86), ("15", "barrier divergence", 86),
            ("16", "read-only path", 86), ("gemm1", "cp.async (not waited for)", 86), ("gemm2", "data race: shared", 86),
            ("freed", "global memory out of bounds", 86), ("host", "global memory out of bounds", 86), ("matmul", "has no PTX: not supported by the fake GPU", 87)]

def main():
    build()
    passed = failed = 0
    def result(ok, name, why=""):
        nonlocal passed, failed
        passed += ok; failed += not ok
        print(("pass " if ok else "FAIL ") + name + ("" if ok else ": " + why), flush=True)
    report = os.path.join(BUILD, "report.jsonl")
    for label, env in (("forward", {}), ("reverse", {"FAKEGPU_ORDER": "reverse"}), ("random", {"FAKEGPU_ORDER": "random", "FAKEGPU_SEED": "3"}), ("caching allocator, sm_80", {"PYTORCH_NO_CUDA_MEMORY_CACHING": "0", "FAKEGPU_SM": "80"})):
        names = []
        if os.path.exists(report): os.remove(report)
        if label in ("reverse", "random"):   # decoupled look-back waits for earlier blocks: needs forward order
            sys.path.insert(0, HERE)
            names = [l.split("def ")[1].split("(")[0] for l in open(os.path.join(HERE, "cases.py")).read().split("@case\n")[1:] for l in [l.splitlines()[0]]]
            names = [n for n in names if not n.startswith("cub_")]
        if env.get("PYTORCH_NO_CUDA_MEMORY_CACHING") == "0":
            env = dict(env); os.environ.pop("PYTORCH_NO_CUDA_MEMORY_CACHING", None)
        rc, out, err = run(names, FAKEGPU_REPORT_FILE=report, **env)
        lines = out.splitlines()
        for l in lines:
            if l.startswith("PASS"): result(True, f"{l[5:]} [{label}]")
            elif l.startswith("FAIL"): result(False, f"{l[5:].split(':')[0]} [{label}]", l)
        if rc: result(False, f"run [{label}]", f"exit status {rc}\n{err[-1500:]}")
        if label == "forward":
            try:
                rows = {r["kernel"].split("(")[0]: r for r in map(json.loads, open(report))}
                g = rows["void gemm_kernel<false, 0>"]
                result(g["mma_instructions"] > 0 and 0.5 < g["global_load_efficiency"] <= 1 and g["bank_conflict_factor"] < 1.3, "report of the gemm", str(g))
                result(rows["stencil_kernel"]["launches"] == 6, "report of launches")
            except Exception as e:
                result(False, "report", repr(e))
            result("hello 5 world 1.50" in out, "device printf")
    for name, arch in PROGRAMS:
        p = subprocess.run([os.path.join(BUILD, name + arch)], env=dict(os.environ, LD_PRELOAD=LIB), capture_output=True, text=True, timeout=600)
        for l in p.stdout.splitlines(): result(l.startswith("PASS"), f"{l[5:]} [{name}, compute_{arch}]", l)
        result(p.returncode == 0, f"program {name}, compute_{arch}", p.stderr[-1000:])
    for name, text, status in MISTAKES:
        rc, out, err = run(["mistake:" + name], FAKEGPU_SPIN_LIMIT="1e6")
        result(rc == status and text in err, "caught: mistake " + name, f"exit status {rc}, expected {status} and '{text}'\n{err[-700:]}{out[-200:]}")
    rc, out, err = run(["mistake:1"], FAKEGPU_KEEP_GOING="1")
    result(rc == 86 and "64 violation(s)" in err and "NOT CAUGHT" in out, "FAKEGPU_KEEP_GOING continues", f"{rc} {err[-500:]}")
    print(f"{passed} passed, {failed} failed")
    return failed != 0

if __name__ == "__main__":
    sys.exit(main())
