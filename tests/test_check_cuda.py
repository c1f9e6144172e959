"""The gate of tools/check_cuda.py catches every kind of planted fault, and passes what is right."""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from planted import nvcc, planted_library

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import check_cuda  # noqa: E402
import check_cuda_binary  # noqa: E402

OK = "scale<float>"
RULES = {"occupancy": 0.25}


@pytest.fixture(scope="module")
def code():
    return check_cuda_binary.read_machine_code(planted_library())


def mangled(code, short):
    names = check_cuda_binary.demangle(list(code[80]))
    return next(name for name, plain in names.items() if check_cuda_binary.shorten(plain) == short)


def entry(name, sm=80, order="forward", threads=64, dynamic=0, **counts):
    """A line of fakegpu's report."""
    shape = [3, 1, 1, threads, 1, 1, dynamic, 1]
    zero = dict.fromkeys(("violations", "mma_instructions", "mma_flops", "fma_lanes", "fma64_lanes"), 0)
    return {"name": name, "sm": sm, "order": order, "shapes": [shape], "launches": 1, **zero, **counts}


def facts_of(code, shorts, entries=None, rules=RULES):
    """As if the module had only these kernels, and each had run on both capabilities."""
    names = [mangled(code, short) for short in shorts]
    kept = {sm: {name: code[sm][name] for name in names} for sm in code}
    runs = {}
    for e in entries if entries is not None else [entry(name, sm) for name in names for sm in (80, 90)]:
        runs.setdefault(e["name"], check_cuda.Runs()).add(e)
    return check_cuda.gather(kept, runs, rules)


def problems(*arguments, **options):
    return check_cuda.problems(facts_of(*arguments, **options))


def test_clean_kernel_passes(code):
    assert problems(code, [OK]) == []


def test_reads_the_compilers_output(code):
    assert set(code) == {80, 90}
    scale = code[80][mangled(code, OK)]
    assert 4 <= scale.registers <= 32
    assert (scale.stack, scale.local, scale.spills, scale.shared) == (0, 0, 0, 0)
    assert scale.count("STG") == 1
    assert scale.count("EXIT") >= 1
    assert code[90][mangled(code, "crowded")].shared == 40960


@pytest.mark.parametrize("short", ["spilling", "local_array"])
@pytest.mark.parametrize("sm", [80, 90])
def test_catches_spills_and_local_arrays(code, short, sm):
    found = problems(code, [short, OK])
    assert any(re.fullmatch(rf"sm_{sm}: {short}: a stack frame of \d+ bytes, 0 allowed .*", p) for p in found), found
    assert any(re.fullmatch(rf"sm_{sm}: {short}: \d+ loads and stores of local memory .*", p) for p in found), found
    assert not any(OK in p for p in found)


def test_stack_frame_rule_has_a_limit(code):
    rule = {"kernels": "local_array", "bytes": 160, "reason": "test"}
    assert problems(code, ["local_array"], rules=RULES | {"stack_frame": [rule]}) == []
    found = problems(code, ["local_array"], rules=RULES | {"stack_frame": [rule | {"bytes": 100}]})
    assert "sm_80: local_array: a stack frame of 160 bytes, 100 allowed (spilled registers or a local array)" in found


def test_catches_kernels_that_no_test_ran(code):
    names = [mangled(code, short) for short in (OK, "scale<double>")]
    entries = [entry(names[0], 80), entry(names[0], 90), entry(names[1], 90)]
    assert problems(code, [OK, "scale<double>"], entries) == ["sm_80: scale<double>: no test ran it"]


def test_kernels_of_old_capabilities(code):
    rules = RULES | {"runs_only_on": [{"kernels": "scale<double>", "capabilities": [75], "reason": "test"}]}
    name = mangled(code, "scale<double>")
    assert problems(code, ["scale<double>"], [entry(name, 75)], rules) == []
    assert problems(code, ["scale<double>"], [], rules) == ["sm_75: scale<double>: no test ran it"]


def test_catches_violations(code):
    name = mangled(code, OK)
    found = problems(code, [OK], [entry(name, 80), entry(name, 90, order="reverse", violations=3)])
    assert found == ["scale<float>: 3 violation(s) of the CUDA model"]


def test_catches_promised_tensor_cores_that_are_not_there(code):
    rules = RULES | {"occupancy": 0, "tensor_core": [{"kernels": "_product", "instruction": "HMMA"}]}
    names = {short: mangled(code, short) for short in ("tensor_product", "scalar_product")}
    good = [entry(names["tensor_product"], sm, mma_instructions=1, mma_flops=2048) for sm in (80, 90)]
    assert problems(code, ["tensor_product"], good, rules) == []
    idle = [entry(names["tensor_product"], sm) for sm in (80, 90)]
    assert "sm_90: tensor_product: ran without a tensor-core instruction" in problems(
        code, ["tensor_product"], idle, rules
    )
    scalar = [entry(names["scalar_product"], sm) for sm in (80, 90)]
    assert "sm_80: scalar_product: no HMMA in its machine code" in problems(code, ["scalar_product"], scalar, rules)


def test_catches_low_occupancy(code):
    name = mangled(code, "crowded")
    entries = [entry(name, sm, threads=32) for sm in (80, 90)]
    found = problems(code, ["crowded"], entries)
    assert [p.split(" (")[0] for p in found] == [
        "sm_80: crowded: occupancy 6.2%, at least 25.0% wanted",
        "sm_90: crowded: occupancy 7.8%, at least 25.0% wanted",
    ]
    floor = {"kernels": "crowded", "floor": 0.06, "reason": "test"}
    assert problems(code, ["crowded"], entries, RULES | {"occupancy_floor": [floor]}) == []
    dynamic = [entry(mangled(code, OK), sm, threads=64, dynamic=60 << 10) for sm in (80, 90)]
    assert len(problems(code, [OK], dynamic)) == 2


def test_catches_rules_without_kernels_and_missing_machine_code(code):
    stale = RULES | {"tensor_core": [{"kernels": "gone", "instruction": "HMMA"}]}
    assert problems(code, [OK], rules=stale) == ["check_cuda.toml: [[tensor_core]] 'gone' matches no kernel"]
    found = problems({80: code[80]}, [OK])
    assert "the module has no machine code for sm_90" in found


def test_other_namespaces_are_left_out(code):
    renamed = {sm: {"_ZN3cub" + name[8:]: kernel for name, kernel in kernels.items()} for sm, kernels in code.items()}
    facts = check_cuda.gather(renamed, {}, RULES)
    assert facts.names == {}


def test_table(code):
    names = [mangled(code, short) for short in (OK, "tensor_product")]
    entries = [
        entry(names[0], 80, global_load_bytes=64, global_load_sectors=4, fma_lanes=5000),
        entry(names[0], 90, order="random"),
        entry(names[1], 80, mma_flops=2048, shared_wavefronts=3, shared_wavefronts_ideal=2),
    ]
    facts = facts_of(code, [OK, "tensor_product"], entries)
    budgets = [{"kernels": "tensor", "mma": 1.0, "bytes": 1.5}, {"kernels": "tensor_", "mma": 1.25}]
    header, scale, tensor = check_cuda.table(facts, budgets).splitlines()[:3]
    columns = header.split()
    scale, tensor = (dict(zip(columns, line.split(), strict=True)) for line in (scale, tensor))
    assert scale["kernel"] == OK
    assert (scale["sm"], scale["orders"], scale["shapes"], scale["launches"]) == ("80,90", "fx", "1", "2")
    assert (scale["load"], scale["fma"], scale["bank"], scale["spills"]) == ("50%", "(5k)", "-", "0")
    assert (tensor["mma"], tensor["bytes"], tensor["bank"], tensor["sm"]) == ("1.25", "1.50", "1.50", "80")


def test_shortened_names():
    short = check_cuda_binary.shorten
    assert short("void pyseg::a::f<__half, (int)4>(float (*)(int), pyseg::a::P<__half>)") == "f<half, 4>"
    assert short("pyseg::(anonymous namespace)::g(int)") == "g"
    assert short("void pyseg::f<pyseg::a::Tile<(int)8>, __nv_bfloat16>(int)") == "f<Tile<8>, bf16>"


def test_occupancy_equals_cuda_occupancy_h(tmp_path):
    """Against NVIDIA's own calculator, for a grid of registers, shared memory and threads."""
    dryrun = subprocess.run([nvcc(), "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True).stderr
    include = Path(re.search(r" TOP=(\S+)", dryrun)[1]) / "include"
    if not (include / "cuda_occupancy.h").exists():
        pytest.skip("cuda: the toolkit has no cuda_occupancy.h")
    program = tmp_path / "occupancy.cpp"
    program.write_text(OCCUPANCY_PROGRAM)
    binary = tmp_path / "occupancy"
    subprocess.run([os.environ.get("CXX", "g++"), "-w", f"-I{include}", str(program), "-o", str(binary)], check=True)
    cases = list(
        itertools.product((75, 80, 90), (16, 32, 40, 63, 96, 168, 255), (0, 1000, 17000, 48000), (32, 96, 256))
    )
    lines = "\n".join(" ".join(map(str, case)) for case in cases)
    output = subprocess.run([str(binary)], input=lines, capture_output=True, text=True, check=True).stdout
    for (sm, registers, shared, threads), blocks in zip(cases, output.split(), strict=True):
        expected = int(blocks) * -(-threads // 32) / check_cuda_binary.MULTIPROCESSORS[sm].warps
        got = check_cuda_binary.occupancy(sm, registers, shared, threads)
        assert got == expected, (sm, registers, shared, threads)


OCCUPANCY_PROGRAM = """
#include <cuda_occupancy.h>
#include <cstdio>
int main() {
  int sm, registers, shared, threads;
  while (scanf("%d %d %d %d", &sm, &registers, &shared, &threads) == 4) {
    cudaOccDeviceProp p;
    p.computeMajor = sm / 10;
    p.computeMinor = sm % 10;
    p.maxThreadsPerBlock = 1024;
    p.maxThreadsPerMultiprocessor = sm == 75 ? 1024 : 2048;
    p.regsPerBlock = p.regsPerMultiprocessor = 65536;
    p.warpSize = 32;
    p.sharedMemPerBlock = 48 << 10;
    p.sharedMemPerMultiprocessor = (sm == 75 ? 64 : sm == 80 ? 164 : 228) << 10;
    p.sharedMemPerBlockOptin = (sm == 75 ? 64 : sm == 80 ? 163 : 227) << 10;
    p.numSms = 1;
    p.reservedSharedMemPerBlock = sm == 75 ? 0 : 1024;
    cudaOccFuncAttributes a;
    a.maxThreadsPerBlock = 1024;
    a.numRegs = registers;
    a.sharedSizeBytes = shared;
    a.partitionedGCConfig = PARTITIONED_GC_OFF;
    a.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    a.maxDynamicSharedSizeBytes = 0;
    cudaOccDeviceState s;
    cudaOccResult r;
    int status = cudaOccMaxActiveBlocksPerMultiprocessor(&r, &p, &a, &s, threads, 0);
    printf("%d\\n", status ? -status : r.activeBlocksPerMultiprocessor);
  }
}
"""
