"""What the object files and the extension modules define and need.

The CPU kernels are compiled once per instruction set. A linker keeps one copy of an inline function that several
objects define, whichever comes first: if that were the AVX-512 copy, older processors would crash in code that has
nothing to do with AVX-512. So nothing that a target's object defines may be visible under a name that another object
could use too.
"""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TARGETS = ("baseline", "avx2", "avx512")

pytestmark = [
    pytest.mark.skipif(not (ROOT / "build/dev").is_dir(), reason="object files: `make dev` has not been run here"),
    pytest.mark.skipif(shutil.which("nm") is None or shutil.which("objdump") is None, reason="no nm or objdump"),
]


def run(*command) -> str:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True).stdout


def objects(target: str) -> list[Path]:
    found = sorted((ROOT / f"build/dev/CMakeFiles/pyseg_cpu_{target}.dir").rglob("*.o"))
    assert found, f"no object files of {target}"
    return found


def defined_globals(path: Path) -> list[str]:
    """The demangled names of all symbols, weak ones too, that other objects could be linked to."""
    lines = run("nm", "--demangle", "--defined-only", "--extern-only", path).splitlines()
    return [line.split(" ", 2)[2] for line in lines if line]


def shared_names(names: list[str], target: str) -> list[str]:
    """Those names that are not the target's own: not in its namespace, and not made from a type in it."""
    return [name for name in names if f"pyseg::{target}::" not in name]


@pytest.mark.parametrize("target", TARGETS)
def test_target_objects_define_nothing_that_others_could_use(target):
    for path in objects(target):
        names = defined_globals(path)
        assert names, f"{path.name} exports nothing"
        assert shared_names(names, target) == [], path


def test_the_check_above_sees_a_shared_inline_function(tmp_path):
    source = tmp_path / "unit.cpp"
    source.write_text(
        "template <typename T> __attribute__((noinline)) T twice(T x) { return x + x; }\n"
        "namespace pyseg::avx512 { float f(float x) { return twice(x); } }\n"
    )
    run("g++", "-O2", "-c", source, "-o", tmp_path / "unit.o")
    names = defined_globals(tmp_path / "unit.o")
    assert shared_names(names, "avx512") == ["float twice<float>(float)"]


def instructions(target: str) -> dict[str, list[str]]:
    """Function -> its instructions."""
    functions: dict[str, list[str]] = {}
    for path in objects(target):
        name = ""
        for line in run("objdump", "--disassemble", "--demangle", "--no-show-raw-insn", path).splitlines():
            if start := re.match(r"[0-9a-f]+ <(.*)>:$", line):
                name = start[1]
            elif "\t" in line:
                functions.setdefault(name, []).append(line.split("\t", 1)[1])
    return functions


def inner_loop(functions: dict[str, list[str]], pattern: str, length: int = 32) -> float:
    """The share of instructions that match, where they lie closest: in some `length` successive ones."""
    best = 0
    for lines in functions.values():
        hits = [bool(re.match(pattern, line)) for line in lines]
        best = max([best, *(sum(hits[i : i + length]) for i in range(max(1, len(hits) - length)))])
    return best / length


def test_baseline_runs_without_avx():
    for name, lines in instructions("baseline").items():
        assert not any(re.search(r"%[yz]mm", line) for line in lines), name
        assert not any(re.match(r"v[a-z]+ ", line) for line in lines), name  # VEX-encoded
    assert inner_loop(instructions("baseline"), r"mulp[sd] .*%xmm") >= 0.2


def test_avx2_uses_its_width_and_no_more():
    functions = instructions("avx2")
    for name, lines in functions.items():
        assert not any(re.search(r"%zmm|%k[0-7]", line) for line in lines), name
    assert inner_loop(functions, r"vfn?m(add|sub)\S+ .*%ymm") >= 0.5


def test_avx512_uses_its_width():
    """Its inner loops are made of 512-bit fused multiply-adds, whether or not this machine could run them."""
    assert inner_loop(instructions("avx512"), r"vfn?m(add|sub)\S+ .*%zmm") >= 0.5


def modules() -> list[Path]:
    specs = [importlib.util.find_spec(f"pyseg.{name}") for name in ("_C", "_C_cuda")]
    return [Path(spec.origin) for spec in specs if spec is not None]


@pytest.mark.parametrize("module", modules(), ids=lambda path: path.name.split(".")[0])
def test_modules_need_only_the_stable_abi_of_torch(module):
    needed = run("nm", "--dynamic", "--demangle", "--undefined-only", module).split("\n")
    names = [line.split(" U ", 1)[1].strip() for line in needed if " U " in line]
    assert not [name for name in names if re.search(r"\b(at|c10|torch|caffe2)::", name)]
    of_torch = [name for name in names if re.match(r"(aoti_)?torch_", name)]
    assert of_torch, "it must register operators somehow"


@pytest.mark.parametrize("module", modules(), ids=lambda path: path.name.split(".")[0])
def test_modules_export_nothing_but_their_entry_point(module):
    exported = run("nm", "--dynamic", "--defined-only", "--extern-only", "--demangle", module).splitlines()
    names = [line.split(" ", 2)[2] for line in exported if line]
    entry = f"PyInit_{module.name.split('.')[0]}"
    assert entry in names
    assert not [name for name in names if re.match(r"pyseg::", name)]
