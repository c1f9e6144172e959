"""How tests get to the fake GPU and back: a small suite of its own, in a folder that looks like this repository."""

import os
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import pytest

import devices
from planted import nvcc, planted_library

TESTS = Path(__file__).parent
SHARED = ["conftest.py", "devices.py", "cuda_budget.py", "fakegpu_worker.py", "fakegpu"]

SUITE = """
import ctypes, os
import pytest, torch
from cuda_budget import cuda_budget

planted = ctypes.CDLL(os.environ["PLANTED"])

def call(function, *tensors, n=()):
    getattr(planted, "launch_" + function)(*(ctypes.c_void_p(t.data_ptr()) for t in tensors), *n)

def doubled(x):
    if not x.is_cuda:
        return 2 * x
    y = torch.empty_like(x)
    call("scale", x, y, n=(x.numel(),))
    return y

@pytest.fixture(scope="module")
def shared_input():
    return torch.arange(100.)

@pytest.mark.parametrize("n", [1, 100])
def test_right(device, shared_input, n):
    x = shared_input[:n]
    assert torch.equal(doubled(x.to(device)).cpu(), 2 * x)

def test_wrong(device):
    print("this is", device)
    assert doubled(torch.ones(3, device=device)).sum() == 7

def test_violation(device):
    x = torch.ones(64, device=device)
    if device == "cuda":
        call("overrun", x, torch.empty_like(x), n=(64,))

def test_unsupported(device):
    if device == "cuda":
        planted.launch_unsupported()

def test_after_the_crash(device, shared_input):
    assert torch.equal(doubled(shared_input.to(device)).cpu(), 2 * shared_input)

def test_skipped(device):
    pytest.skip("no reason")

@pytest.mark.xfail(reason="known")
def test_known_failure(device):
    assert device == "tpu"

@pytest.mark.needs_gpu("speed")
def test_speed(device):
    pass

@pytest.mark.cuda_only
@pytest.mark.sm(75)
def test_old_device(device):
    assert torch.cuda.get_device_capability() == (7, 5)
    doubled(torch.ones(3, device=device))

@pytest.mark.block_orders
def test_orders(device):
    doubled(torch.ones(300, device=device))

def test_second_device(device):
    if device == "cuda":
        x = torch.ones(3, device="cuda:1")
        with torch.cuda.device(1):
            assert doubled(x).device == x.device

def test_other_device(device):
    x = torch.ones(3, device=device)
    if device == "cuda":
        with torch.cuda.device(1):
            call("scale", x, torch.empty_like(x), n=(3,))

N = 1024
PRODUCT = [torch.zeros(*s, dtype=d) for s, d in (((2, 32), torch.int32), ((32,), torch.int32), ((4, 32), torch.float))]
SCALAR = [torch.zeros(*s) for s in ((16, 8), (8, 8), (16, 8))]

def run_budget(device, function, n, *tensors, **budget):
    tensors = [t.to(device) for t in tensors]
    with cuda_budget(function, **budget):
        if device == "cuda":
            call(function, *tensors, n=n)

@pytest.mark.parametrize("budget", [
    dict(min_bytes=8 * N, launches=1, mma=0, max_fma=0),
    dict(min_bytes=5 * N, bytes_ratio=1.7),
], ids=["exact", "slack"])
def test_budget_kept(device, budget):
    run_budget(device, "scale", (N,), torch.ones(N), torch.ones(N), **budget)

@pytest.mark.parametrize("budget", [
    dict(min_bytes=4 * N), dict(min_bytes=10 * N), dict(launches=2), dict(mma=1), dict(fma=1),
], ids=["too many bytes", "too few bytes", "launches", "no mma", "no fma"])
def test_budget_left(device, budget):
    run_budget(device, "scale", (N,), torch.ones(N), torch.ones(N), **budget)

def test_tensor_cores(device):
    run_budget(device, "tensor_product", (), *PRODUCT, mma=1024, max_fma=0)

def test_scalar_arithmetic(device):
    run_budget(device, "scalar_product", (), *SCALAR, mma=0, fma=1024)

def test_scalar_for_tensor_cores(device):
    run_budget(device, "scalar_product", (), *SCALAR, mma=1024)

def test_too_much_scalar(device):
    run_budget(device, "scalar_product", (), *SCALAR, max_fma=128)

def test_other_kernel(device):
    run_budget(device, "scale", (), *SCALAR) if device == "cpu" else None
    if device == "cuda":
        x = torch.ones(3, device=device)
        with cuda_budget("tensor_product"):
            call("scale", x, x.clone(), n=(3,))
"""


class Run:
    """Outcomes by test name: "passed", "skipped", or the text of the failure; and what was printed."""

    def __init__(self, folder, *arguments, **settings):
        environment = {k: v for k, v in os.environ.items() if not k.startswith("FAKEGPU_") and k != "CI"}
        environment |= {"PYSEG_FAKEGPU": "1", "PLANTED": str(planted_library())} | settings
        xml_file = folder / "result.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-c",
            "pytest.ini",
            "-p",
            "no:cacheprovider",
            f"--junitxml={xml_file}",
        ]
        done = subprocess.run([*command, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
        self.status, self.output = done.returncode, done.stdout + done.stderr
        self.outcomes = {}
        for case in xml.etree.ElementTree.parse(xml_file).iter("testcase"):
            failure, skipped = case.find("failure"), case.find("skipped")
            output = "".join(case.itertext())
            self.outcomes[case.get("name")] = (
                output if failure is not None else "skipped" if skipped is not None else "passed"
            )

    def __getitem__(self, name):
        return self.outcomes[name]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    nvcc()
    if devices.cuda_mode()[0] == "none":
        pytest.skip(f"cuda: {devices.cuda_mode()[1]}")
    folder = tmp_path_factory.mktemp("suite")
    (folder / "tests").mkdir()
    for name in SHARED:
        (folder / "tests" / name).symlink_to(TESTS / name)
    (folder / "build").symlink_to(TESTS.parent / "build")
    (folder / "pyseg").mkdir()
    (folder / "pyseg" / "_C_cuda.so").touch()
    (folder / "pyseg" / "__init__.py").touch()
    (folder / "pytest.ini").write_text("[pytest]\naddopts = --strict-markers\njunit_logging = all\n")
    (folder / "tests" / "allowed_skips.txt").write_text("# allowed\n* | needs a GPU: *\n")
    (folder / "tests" / "test_suite.py").write_text(SUITE)
    return folder


@pytest.fixture(scope="module")
def everything(folder):
    return Run(folder)


def test_results_come_back(everything):
    for n in (1, 100):
        assert everything[f"test_right[cpu-{n}]"] == everything[f"test_right[cuda-{n}]"] == "passed"
    assert everything["test_skipped[cuda]"] == everything["test_known_failure[cuda]"] == "skipped"
    assert everything["test_speed[cpu]"] == "passed"
    assert everything["test_speed[cuda]"] == "skipped"
    for name in ("test_old_device", "test_orders", "test_second_device"):
        assert everything[f"{name}[cuda]"] == "passed"
    assert everything.status == pytest.ExitCode.TESTS_FAILED
    summary = everything.output.strip().splitlines()[-1]
    failed = sum(outcome not in ("passed", "skipped") for outcome in everything.outcomes.values())
    assert f"{failed} failed" in summary


def test_failures_come_back_with_their_output(everything):
    assert "assert" in everything["test_wrong[cpu]"]
    assert "this is cpu" in everything["test_wrong[cpu]"]
    assert "assert" in everything["test_wrong[cuda]"]
    assert "this is cuda" in everything["test_wrong[cuda]"]


def test_violation_fails_its_own_test(everything):
    assert everything["test_violation[cpu]"] == "passed"
    assert "1 violation(s) of the CUDA model" in everything["test_violation[cuda]"]
    assert "global memory out of bounds: read of 4 bytes" in everything["test_violation[cuda]"]
    assert "access to another device's memory" in everything["test_other_device[cuda]"]
    assert everything["test_budget_kept[cuda-exact]"] == "passed"


def test_unsupported_fails_its_own_test(everything):
    assert "does not support" in everything["test_unsupported[cuda]"]
    assert "CUDA function cudaGraphCreate" in everything["test_unsupported[cuda]"]
    assert "out of bounds" not in everything["test_unsupported[cuda]"]
    assert everything["test_after_the_crash[cuda]"] == "passed"


@pytest.mark.parametrize(
    ("test", "message"),
    [
        ("test_budget_left[cuda-too many bytes]", "bytes moved: 8192, expected 4096 to 6144"),
        ("test_budget_left[cuda-too few bytes]", "bytes moved: 8192, expected 10240 to 15360"),
        ("test_budget_left[cuda-launches]", "launches: 1, expected 2"),
        ("test_budget_left[cuda-no mma]", "tensor-core multiply-adds: 0, expected 1"),
        ("test_budget_left[cuda-no fma]", "ordinary multiply-adds: 0, expected 1"),
        ("test_scalar_for_tensor_cores[cuda]", "tensor-core multiply-adds: 0, expected 1024"),
        ("test_too_much_scalar[cuda]", "ordinary multiply-adds: 1024, expected 0 to 128"),
        ("test_other_kernel[cuda]", "no kernel that matches 'tensor_product' was launched"),
    ],
)
def test_budgets_are_enforced(everything, test, message):
    assert message in everything[test]
    assert everything[test.replace("cuda", "cpu")] == "passed"


def test_budgets_that_are_kept(everything):
    for name in ("test_budget_kept[cuda-slack]", "test_tensor_cores[cuda]", "test_scalar_arithmetic[cuda]"):
        assert everything[name] == "passed", everything[name]


def test_every_variant(folder):
    run = Run(folder, "-k", "orders or old_device", "--cuda-sm=75,80,90", "--cuda-orders=forward,reverse,random")
    names = {f"test_orders[cuda-sm{sm}{order}]" for sm in (80, 90) for order in ("", "-reverse", "-random")}
    assert set(run.outcomes) == names | {"test_orders[cpu]", "test_old_device[cuda-sm75]"}
    assert set(run.outcomes.values()) == {"passed"}
    assert run.status == 0


def test_stops_at_the_first_failure(folder):
    run = Run(folder, "-x", "-k", "cuda and (wrong or violation)")
    assert list(run.outcomes) == ["test_wrong[cuda]"]


def test_strict_skips(folder):
    selection = ["-k", "(skipped or speed) and cpu"]
    assert Run(folder, *selection).status == 0
    run = Run(folder, *selection, CI="true")
    assert run.status == 1
    assert "tests/test_suite.py::test_skipped[cpu]: no reason" in run.output
    assert "test_speed" not in run.output


def test_without_a_compiler(folder):
    run = Run(folder, "-k", "right", PYSEG_FAKEGPU="0", CUDA_VISIBLE_DEVICES="", NVCC="no-such-nvcc")
    assert "cuda tests: skipped, no GPU, and no nvcc to build the fake one" in run.output
    assert run["test_right[cpu-1]"] == "passed"
    assert run["test_right[cuda-1]"] == "skipped"
