"""Runs every operator test on `cpu` and on `cuda`, with or without a GPU. How to write tests: see devices.py.

Without a GPU the `cuda` items go to a child process that has libfakegpu.so preloaded (fakegpu_worker.py); the
reports that come back are replayed here, so that -x, -k, --durations, --lf and the summary work as always. One child
runs at a time, for one compute capability, started when its first item is due. With pytest-xdist (`make test`) each
worker has a child of its own.
"""

import fnmatch
import os
from pathlib import Path

import hypothesis
import pytest
import torch
from _pytest.runner import runtestprotocol

import devices
from fakegpu_worker import FakeGpuChecks, WorkerProcess

collect_ignore = ["fakegpu"]  # has its own runner: make -C tests/fakegpu check

# Interpreted kernels and shared machines are slow at times: no test depends on time.
hypothesis.settings.register_profile("pyseg", deadline=None)
hypothesis.settings.load_profile("pyseg")

ALLOWED_SKIPS = Path(__file__).parent / "allowed_skips.txt"


def pytest_addoption(parser):
    group = parser.getgroup("pyseg")
    group.addoption(
        "--cuda-sm", default="", metavar="75,80,90", help="fake GPU: capabilities (default: the first a test supports)"
    )
    group.addoption(
        "--cuda-orders",
        default="forward",
        metavar="forward,reverse,random",
        help="fake GPU: orders of the blocks; only tests marked block_orders take more than the first",
    )
    group.addoption(
        "--strict-skips",
        action="store_true",
        default=os.environ.get("CI", "").lower() in ("1", "true"),
        help="fail on a skip that tests/allowed_skips.txt does not list (default with CI=true)",
    )


def pytest_configure(config):
    if worker := getattr(config, "workerinput", None):  # of pytest-xdist: the workers share the processors
        threads = max(1, len(os.sched_getaffinity(0)) // worker["workercount"])
        os.environ["OMP_NUM_THREADS"] = str(threads)  # of child processes
        torch.set_num_threads(threads)
    for line in (
        "cuda: the test uses a CUDA device (set by the parameter `device`)",
        "cuda_only: the parameter `device` is never cpu",
        "sm(*capabilities): compute capabilities of the fake GPU that the test is for (default 80, 90)",
        "block_orders: also run with the orders of --cuda-orders on the fake GPU",
        "needs_gpu(reason): skipped on the fake GPU",
        "fakegpu_run(sm, order): set by the parameter `device`",
    ):
        config.addinivalue_line("markers", line)
    mode, _ = devices.cuda_mode()
    if mode == "preloaded":
        config.pluginmanager.register(FakeGpuChecks(), "fakegpu-checks")
    elif mode == "fakegpu":
        config.pluginmanager.register(FakeGpuRunner(config), "fakegpu-runner")
    config.pluginmanager.register(SkipGate(), "skip-gate")


def pytest_report_header(config):
    mode, why = devices.cuda_mode()
    return f"cuda tests: {'skipped, ' if mode == 'none' else ''}{why}"


# ------------------------------------------------------------------------------------------ the parameter `device`


def pytest_generate_tests(metafunc):
    if "device" not in metafunc.fixturenames:
        return
    parameters = cuda_parameters(metafunc.definition, metafunc.config)
    if metafunc.definition.get_closest_marker("cuda_only") is None:
        parameters.insert(0, "cpu")
    elif not parameters:
        reason = "cuda: not meant for the capabilities of --cuda-sm"
        parameters.append(pytest.param("cuda", marks=pytest.mark.skip(reason=reason)))
    metafunc.parametrize("device", parameters)


def cuda_parameters(definition, config):
    """`cuda` once, or once for each capability and block order of the fake GPU that is asked for."""
    if devices.cuda_mode()[0] not in ("fakegpu", "preloaded"):
        return [pytest.param("cuda", marks=pytest.mark.cuda)]
    mark = definition.get_closest_marker("sm")
    supported = mark.args if mark else devices.DEFAULT_SMS
    asked = [int(sm) for sm in config.getoption("--cuda-sm").split(",") if sm]
    sms = [sm for sm in asked if sm in supported] if asked else supported[:1]
    orders = config.getoption("--cuda-orders").split(",")
    if definition.get_closest_marker("block_orders") is None:
        orders = orders[:1]
    parameters = []
    for sm in sms:
        for order in orders:
            name = "-".join(["cuda"] + [f"sm{sm}"] * bool(asked) + [order] * (order != "forward"))
            marks = [pytest.mark.cuda, pytest.mark.fakegpu_run(sm=sm, order=order)]
            parameters.append(pytest.param("cuda", marks=marks, id=name))
    return parameters


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    mode, why = devices.cuda_mode()
    for item in items:
        needs_gpu = item.get_closest_marker("needs_gpu")
        if item.get_closest_marker("cuda") is None:
            continue
        if mode == "none":
            item.add_marker(pytest.mark.skip(reason=f"cuda: {why}"))
        elif needs_gpu is not None and mode != "gpu":
            item.add_marker(pytest.mark.skip(reason=f"needs a GPU: {needs_gpu.args[0]}"))
    if mode == "fakegpu":  # after the rest, one capability after the other: one child at a time
        items.sort(key=lambda item: capability(item) or 0)


def capability(item):
    """The capability whose child runs the item, or None for an item of this process."""
    run = item.get_closest_marker("fakegpu_run")
    return run.kwargs["sm"] if run is not None and item.get_closest_marker("skip") is None else None


class FakeGpuRunner:
    """Hands `cuda` items to the child process of their capability."""

    def __init__(self, config):
        self.config = config
        self.files = {}  # capability -> files with items for it
        self.worker = None
        self.trouble = []  # what went wrong outside any test

    @pytest.hookimpl(trylast=True)
    def pytest_collection_finish(self, session):
        for item in session.items:
            if (sm := capability(item)) is not None:
                self.files.setdefault(sm, {})[str(item.path)] = None
        if self.files and not self.config.option.collectonly:
            devices.build_fakegpu()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item, nextitem):
        sm = capability(item)
        if sm is None:
            if nextitem is None or capability(nextitem) is None:
                return None
            # The last item of this process: its fixtures must not wait for the items of the child.
            item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
            runtestprotocol(item, nextitem=None)
            item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
            return True
        if self.worker is None or self.worker.sm != sm:
            self.stop_worker()
            self.worker = WorkerProcess(sm, list(self.files[sm]), self.config)
        following = nextitem.nodeid if nextitem is not None and capability(nextitem) == sm else None
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in self.worker.run(item, following):
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        if not self.worker.alive:
            self.worker = None
        return True

    def stop_worker(self):
        if self.worker is not None:
            self.trouble += self.worker.stop()
        self.worker = None

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node, error):
        """pytest-xdist: what went wrong in one of its workers."""
        self.trouble += getattr(node, "workeroutput", {}).get("fakegpu", [])

    def pytest_sessionfinish(self, session):
        self.stop_worker()
        if hasattr(self.config, "workeroutput"):
            self.config.workeroutput["fakegpu"] = self.trouble
        if self.trouble and session.exitstatus == 0:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        for line in self.trouble:
            terminalreporter.write_line(f"fakegpu: {line}", red=True)


# ------------------------------------------------------------------------------------------ skips


class SkipGate:
    """Fails a run with --strict-skips or CI=true that skips a test for a reason that is not in allowed_skips.txt."""

    def __init__(self):
        lines = ALLOWED_SKIPS.read_text().splitlines()
        lines = [line for line in lines if line.strip() and not line.startswith("#")]
        self.allowed = [[part.strip() for part in line.split("|")] for line in lines]
        self.unexpected = []

    def is_allowed(self, nodeid, reason):
        return any(fnmatch.fnmatchcase(nodeid, test) and fnmatch.fnmatchcase(reason, why) for test, why in self.allowed)

    def note(self, report):
        if not report.skipped or hasattr(report, "wasxfail"):
            return
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reason = reason.removeprefix("Skipped: ")
        if not self.is_allowed(report.nodeid, reason):
            self.unexpected.append(f"{report.nodeid}: {reason}")

    pytest_runtest_logreport = pytest_collectreport = lambda self, report: self.note(report)

    def pytest_sessionfinish(self, session):
        if self.unexpected and session.config.getoption("--strict-skips") and session.exitstatus == 0:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter, config):
        if self.unexpected and config.getoption("--strict-skips"):
            terminalreporter.section("skips that tests/allowed_skips.txt does not list", red=True)
            for line in self.unexpected:
                terminalreporter.write_line(line, red=True)
