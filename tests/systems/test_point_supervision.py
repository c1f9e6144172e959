"""The example of point supervision, as a user runs it: a few steps."""

import pytest

from warm_python import run_example

Image = pytest.importorskip("PIL.Image")


def run(*arguments):
    return run_example("point_supervision.py", *arguments)


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
