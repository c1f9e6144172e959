"""The example of point supervision, as a user runs it: a few steps."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

Image = pytest.importorskip("PIL.Image")
SCRIPT = Path(__file__).parents[2] / "examples" / "point_supervision.py"


def run(*arguments):
    import pyseg

    environment = {**os.environ, "PYTHONPATH": str(Path(pyseg.__file__).parent.parent)}
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)


def test_few_steps_do_not_reach_the_threshold(tmp_path):
    done = run("--steps", 2, "--threads", 1, "-o", tmp_path / "points.png")
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("the full loss reached 0.")
    lines = done.stdout.splitlines()
    assert [line[:16].strip() for line in lines[1:5]] == ["image labels", "and points", "and objectness", "all labels"]
    with Image.open(tmp_path / "points.png") as picture:
        assert picture.width > 7 * 200


def test_bad_arguments_are_one_line(tmp_path):
    done = run("-o", tmp_path / "points.jpg")
    assert done.returncode == 2
    assert done.stderr.startswith("point_supervision: -o must end in .png")
    assert done.stderr.count("\n") == 1
