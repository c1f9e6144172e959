"""Programs in processes of their own that need not import torch again: a server imports it once and forks.

The server runs no parallel loop before it forks, so that the forks start threads of their own as they would anyway.
"""

import atexit
import functools
import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

TREE = Path(__file__).resolve().parents[1]


def run_example(name: str, *arguments: object) -> subprocess.CompletedProcess:
    """examples/NAME with these arguments, as a user runs it."""
    file = TREE / "examples" / name
    return _run([str(file), *map(str, arguments)], None, [str(file.parent)], "")


def run_code(code: str, folder: Path, cpu_capability: str = "") -> subprocess.CompletedProcess:
    """Code that may import what the tests of `folder` can."""
    return _run(["-c"], code, [str(folder), str(Path(__file__).parent)], cpu_capability)


def _run(argv: list[str], code: str | None, path: list[str], cpu_capability: str) -> subprocess.CompletedProcess:
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        request = {"argv": argv, "code": code, "path": path, "out": str(out), "err": str(err)}
        reply = _server(cpu_capability).ask(request)
        if isinstance(reply, str):  # it could not even start
            return subprocess.CompletedProcess(argv, 1, "", reply)
        return subprocess.CompletedProcess(argv, reply, out.read_text(), err.read_text())


@functools.cache
def _server(cpu_capability: str) -> "_Server":
    return _Server(cpu_capability)


class _Server:
    def __init__(self, cpu_capability: str):
        import pyseg  # the server's is the one that this process has

        path = os.pathsep.join([str(Path(pyseg.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        environment = dict(os.environ, PYSEG_CPU_CAPABILITY=cpu_capability, PYTHONPATH=path)
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            [sys.executable, __file__], env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True
        )
        atexit.register(self.process.kill)

    def ask(self, request: dict) -> int | str:
        """The exit status, or what the server said when it ended."""
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())["status"]
        except (BrokenPipeError, json.JSONDecodeError):
            _server.cache_clear()
            return self.process.stderr.read()


# ---- the server ----


def _serve() -> None:
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401

    import pyseg.functional
    import pyseg.nn  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        process = os.fork()
        if process == 0:
            os._exit(_become(request))
        _, status = os.waitpid(process, 0)
        print(json.dumps({"status": os.waitstatus_to_exitcode(status)}), flush=True)


def _become(request: dict) -> int:
    """What Python does with a program, up to its exit status."""
    null = os.open(os.devnull, os.O_RDONLY)
    out, err = (os.open(request[name], os.O_WRONLY | os.O_CREAT, 0o600) for name in ("out", "err"))
    for target, source in enumerate((null, out, err)):
        os.dup2(source, target)
    sys.argv = request["argv"]
    sys.path[:0] = request["path"]
    status = 0
    try:
        if request["code"] is None:
            runpy.run_path(sys.argv[0], run_name="__main__")
        else:
            exec(request["code"], {"__name__": "__main__"})
    except SystemExit as end:
        if end.code is not None:
            status = end.code if isinstance(end.code, int) else 1
            if not isinstance(end.code, int):
                print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status


if __name__ == "__main__":
    _serve()
