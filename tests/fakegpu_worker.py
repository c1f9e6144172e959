"""The child process that runs `cuda` tests on the fake GPU, and the parent's end of the two pipes to it.

Both sides speak JSON lines. The parent sends {"nodeid", "next"} for a test and gets {"report": ...} for each
phase, then {"done": true}. At the start the child collects the same files and says {"ready": true}.

The child keeps going after a violation, so that it can be charged to its test. Something that fakegpu does not
support, or a crash, ends the child: the test that ran fails with what fakegpu said last, the next gets a new child.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import devices


class WorkerProcess:
    """The parent's view of one child."""

    def __init__(self, sm: int, files: list[str], config: pytest.Config):
        self.sm = sm
        self.alive = True
        self._config = config
        self._folder = tempfile.TemporaryDirectory(prefix="pyseg-fakegpu-")
        self._log = Path(self._folder.name) / "log"
        self._output = Path(self._folder.name) / "output"
        commands, self._to_child = os.pipe()
        self._from_child, answers = os.pipe()
        environment = devices.fakegpu_environment(sm)
        environment.update(FAKEGPU_KEEP_GOING="1", FAKEGPU_LOG_FILE=str(self._log))
        environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
        shown = None if config.getoption("capture") == "no" else self._output.open("w")
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(commands), str(answers), *self._arguments(files)],
            pass_fds=(commands, answers),
            env=environment,
            cwd=config.invocation_params.dir,
            stdout=shown,
            stderr=subprocess.STDOUT if shown else None,
        )
        os.close(commands)
        os.close(answers)
        self._requests = os.fdopen(self._to_child, "w")
        self._replies = os.fdopen(self._from_child)
        self._ready = False

    def _arguments(self, files: list[str]) -> list[str]:
        option = self._config.option
        arguments = ["-p", "no:cacheprovider", "--rootdir", str(self._config.rootpath), "--maxfail=0"]
        if self._config.inipath is not None:
            arguments += ["-c", str(self._config.inipath)]
        arguments += [f"--tb={option.tbstyle}", f"--capture={option.capture}"] + ["--showlocals"] * option.showlocals
        for name in ("--cuda-sm", "--cuda-orders", "--hypothesis-seed", "--hypothesis-profile"):
            with contextlib.suppress(ValueError):
                if value := self._config.getoption(name):
                    arguments.append(f"{name}={value}")
        return arguments + files

    def run(self, item: pytest.Item, following: str | None):
        """Yields the reports of one test."""
        said_before = len(_read(self._log))
        try:
            if not self._ready:
                self._ready = self._receive()["ready"]
            self._requests.write(json.dumps({"nodeid": item.nodeid, "next": following}) + "\n")
            self._requests.flush()
            while "report" in (message := self._receive()):
                data = message["report"]
                if data["outcome"] == "skipped" and isinstance(data["longrepr"], list):
                    data["longrepr"] = tuple(data["longrepr"])  # (file, line, reason), which JSON made a list
                yield self._config.hook.pytest_report_from_serializable(config=self._config, data=data)
        except (EOFError, BrokenPipeError):
            yield self._obituary(item, said_before)

    def _receive(self) -> dict:
        line = self._replies.readline()
        if not line:
            raise EOFError
        return json.loads(line)

    def _obituary(self, item: pytest.Item, said_before: int) -> pytest.TestReport:
        self.alive = False
        status = self._process.wait()
        meaning = {87: "something that fakegpu does not support"}.get(status, f"exit status {status}")
        said = _read(self._log)[said_before:] or _read(self._output)
        text = f"the fakegpu process ended during this test: {meaning}\n{said[-6000:]}"
        self._folder.cleanup()
        return pytest.TestReport(item.nodeid, item.location, dict(item.keywords), "failed", text, "call")

    def stop(self) -> list[str]:
        """Ends the child after its last test; returns what went wrong outside the tests."""
        self._requests.close()
        status = self._process.wait()
        trouble = (
            [] if status == 0 else [f"the process for sm_{self.sm} ended with {status}", *_read(self._log).splitlines()]
        )
        self._folder.cleanup()
        self.alive = False
        return trouble


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


# ------------------------------------------------------------------------------------------ inside the child


class FakeGpuChecks:
    """In a process with the fake GPU: each phase of a test fails if it broke a rule of the CUDA model."""

    def __init__(self):
        sys.path.insert(0, str(devices.FAKEGPU_FOLDER / "python"))
        import fakegpu_torch

        fakegpu_torch.install()
        self.gpu = devices.fake_gpu()
        self.log = Path(os.environ["FAKEGPU_LOG_FILE"]) if "FAKEGPU_LOG_FILE" in os.environ else None

    def _checked(self, item, when):
        start = len(_read(self.log)) if self.log else 0
        self.gpu.reset_violations()
        try:
            result = yield
        finally:
            count = self.gpu.violations()
            said = _read(self.log)[start:] if self.log else "(see standard error)"
            self.gpu.reset_violations()
            if said and count:
                item.add_report_section(when, "fakegpu", said)
        if count:
            pytest.fail(f"{count} violation(s) of the CUDA model on the fake GPU\n{said}", pytrace=False)
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item):
        run = item.get_closest_marker("fakegpu_run")
        self.gpu.set_order(run.kwargs["order"] if run else "forward")
        return (yield from self._checked(item, "setup"))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        return (yield from self._checked(item, "call"))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self, item):
        return (yield from self._checked(item, "teardown"))


class Worker:
    """Replaces pytest's loop over all items by one that runs what the parent names."""

    def __init__(self, requests, replies):
        self.requests, self.replies = requests, replies

    def send(self, message: dict) -> None:
        self.replies.write(json.dumps(message) + "\n")
        self.replies.flush()

    def pytest_runtestloop(self, session):
        items = {item.nodeid: item for item in session.items}
        self.send({"ready": True})
        for line in self.requests:
            request = json.loads(line)
            item = items[request["nodeid"]]
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=items.get(request["next"]))
            self.send({"done": True})
        return True

    def pytest_runtest_logreport(self, report):
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        self.send({"report": data})

    def pytest_configure(self, config):
        self.config = config


if __name__ == "__main__":
    requests, replies = (os.fdopen(int(fd), mode) for fd, mode in zip(sys.argv[1:3], "rw", strict=True))
    del os.environ["LD_PRELOAD"]  # compilers and the like that a test starts need no GPU
    status = pytest.main(sys.argv[3:], plugins=[Worker(requests, replies)])
    sys.exit(
        0
        if status in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED)
        else int(status)
    )
