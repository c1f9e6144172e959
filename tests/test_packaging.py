"""sdist, wheel, one wheel for several torch releases, the errors of a broken installation, and what CMake decides.

The wheel is made from the objects that `make dev` left in build/dev, so nothing is compiled twice.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import pyseg

ROOT = Path(__file__).resolve().parents[1]
OTHER_TORCH = "2.13.0+cpu"  # not the release that the tests are built with, and without CUDA
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
HAS_CUDA_BUILD = pyseg.build_info().cuda_version is not None

# Runs an operator, and prints what a caller wants to know of the installation.
PROGRAM = """
import json, torch, pyseg
x, w = torch.randn(1, 3, 9, 9), torch.randn(4, 3, 3, 3)
y = pyseg.functional.atrous_conv2d(x, w, padding=2, dilation=2)
torch.testing.assert_close(y, torch.nn.functional.conv2d(x, w, padding=2, dilation=2), atol=1e-4, rtol=1e-4)
has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
print(json.dumps({
    "file": pyseg.__file__, "torch": torch.__version__, "status": pyseg.build_info().cuda_status,
    "cpu": has_kernel("pyseg::atrous_conv2d", "CPU"), "cuda": has_kernel("pyseg::atrous_conv2d", "CUDA"),
    "initialised": torch.cuda.is_initialized()}))
"""


def run(*command, cwd=ROOT, **environment) -> subprocess.CompletedProcess:
    words = [str(word) for word in command]
    return subprocess.run(words, cwd=cwd, env=os.environ | environment, capture_output=True, text=True)


def python(program: str, *paths: Path) -> subprocess.CompletedProcess:
    """Runs a program outside the source tree, with these folders before everything else that is installed."""
    return run(sys.executable, "-P", "-c", program, cwd="/", PYTHONPATH=os.pathsep.join(map(str, paths)))


def facts(result: subprocess.CompletedProcess) -> dict:
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


# ------------------------------------------------------------------------------------------ sdist and wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    options = ["-Cbuild-dir=build/dev", "-Ccmake.define.PYSEG_INPLACE=ON"]
    result = run(sys.executable, "-P", "-m", "build", "--wheel", "--no-isolation", "--outdir", out, *options)
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = out.glob("pyseg_kernels-*.whl")
    return path


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory) -> Path:
    """A folder that the wheel is installed in."""
    folder = tmp_path_factory.mktemp("site")
    result = run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, wheel)
    assert result.returncode == 0, result.stderr
    return folder


def test_wheel_has_what_it_needs_and_no_more(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert f"pyseg/_C{SUFFIX}" in names
    assert (f"pyseg/_C_cuda{SUFFIX}" in names) == HAS_CUDA_BUILD
    for name in ("py.typed", "_C.pyi", "collect_env.py", "_ops/atrous_conv2d.py", "nn/__init__.py"):
        assert f"pyseg/{name}" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    info = f"pyseg_kernels-{pyseg.__version__}.dist-info/"
    assert [name for name in names if not name.startswith(("pyseg/", info))] == []
    assert len(names) == len(set(names))


@pytest.mark.skipif(shutil.which("readelf") is None, reason="no readelf")
def test_modules_find_torch_relative_to_themselves(site):
    for module in site.glob("pyseg/*.so"):
        dynamic = run("readelf", "--dynamic", module).stdout
        (path,) = [
            line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "RUNPATH" in line or "RPATH" in line
        ]
        assert path.split(":")[0] == "$ORIGIN/../torch/lib"
        assert all(entry.startswith("$ORIGIN/") for entry in path.split(":"))


def test_sdist_has_all_sources(tmp_path):
    result = run(sys.executable, "-P", "-m", "build", "--sdist", "--no-isolation", "--outdir", tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    tree = [file for folder in ("csrc", "cmake", "pyseg") for file in (ROOT / folder).rglob("*") if file.is_file()]
    wanted = {str(file.relative_to(ROOT)) for file in tree if file.suffix not in (".so", ".pyc")}
    assert wanted - names == set()
    assert {"CMakeLists.txt", "pyproject.toml", "LICENSE", "PKG-INFO"} <= names
    assert not [name for name in names if name.endswith((".so", ".o")) or name.startswith(("build/", ".venv"))]


# ------------------------------------------------------------------------------------------ one wheel, any torch


def test_wheel_under_the_torch_it_was_built_with(site):
    seen = facts(python(PROGRAM, site))
    assert seen["file"].startswith(str(site))
    assert seen["torch"] == torch.__version__
    assert seen["cpu"]
    assert seen["cuda"] == HAS_CUDA_BUILD  # registered although there may be no GPU
    assert not seen["initialised"]


@pytest.fixture(scope="module")
def other_torch() -> Path:
    """A folder with another torch, kept between runs."""
    folder = ROOT / "build" / f"torch-{OTHER_TORCH}"
    complete = folder / ".complete"
    if not complete.exists():
        shutil.rmtree(folder, ignore_errors=True)
        command = ["install", "--quiet", "--no-deps", "--target", folder, f"torch=={OTHER_TORCH}"]
        result = run(sys.executable, "-m", "pip", *command)
        if result.returncode:
            pytest.skip(
                f"other torch: pip has no torch {OTHER_TORCH} for this Python: {result.stderr.splitlines()[-1]}"
            )
        complete.touch()
    return folder


@pytest.mark.skipif(torch.__version__ == OTHER_TORCH, reason="other torch: the tests run with it already")
def test_wheel_under_another_torch(site, other_torch):
    seen = facts(python(PROGRAM, site, other_torch))
    assert seen["file"].startswith(str(site))
    assert seen["torch"] == OTHER_TORCH
    assert seen["cpu"]
    assert not seen["cuda"]
    if HAS_CUDA_BUILD:
        assert seen["status"] == f"torch {OTHER_TORCH} is a CPU build"


# ------------------------------------------------------------------------------------------ broken installations


@pytest.fixture
def broken(site, tmp_path) -> Path:
    """A copy of the installed package without its extension modules."""
    shutil.copytree(site / "pyseg", tmp_path / "pyseg", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path


def error_of(result: subprocess.CompletedProcess) -> str:
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: pyseg ")
    return last


def test_missing_module_is_named(broken):
    assert f"there is no _C extension module in {broken / 'pyseg'}" in error_of(python("import pyseg", broken))


def test_module_for_another_python_is_named(broken):
    (broken / "pyseg/_C.cpython-27-x86_64-linux-gnu.so").touch()
    error = error_of(python("import pyseg", broken))
    assert "_C.cpython-27-x86_64-linux-gnu.so was built for another Python, this one needs _C" + SUFFIX in error


def test_truncated_module_is_named(broken):
    (broken / f"pyseg/_C{SUFFIX}").write_bytes(b"\x7fELF")
    assert "_C is there but does not load" in error_of(python("import pyseg", broken))


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_undefined_symbol_is_named(broken):
    source = broken / "module.cpp"
    source.write_text('extern "C" int torch_from_the_future();\nint (*used)() = torch_from_the_future;')
    assert run("g++", "-shared", "-fPIC", "-Wl,-z,now", source, "-o", broken / f"pyseg/_C{SUFFIX}").returncode == 0
    error = error_of(python("import pyseg", broken))
    assert f"_C does not fit torch {torch.__version__}" in error
    assert "undefined symbol: torch_from_the_future" in error


def test_old_torch_is_named(site):
    program = "import torch; torch.__version__ = type(torch.__version__)('2.9.1'); import pyseg"
    assert "pyseg needs torch 2.11 or later, found torch 2.9.1 in " in error_of(python(program, site))


def test_missing_torch_is_named(site, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('libsomething.so: cannot open shared object file')")
    error = error_of(python("import pyseg", site, tmp_path))
    assert "pyseg needs torch 2.11 or later, but importing torch failed: libsomething.so" in error


def test_collect_env_works_where_the_import_is_broken(broken):
    result = run(sys.executable, "-P", "-m", "pyseg.collect_env", cwd="/", PYTHONPATH=str(broken))
    assert result.returncode == 0, result.stderr
    report = dict(line.split(":", 1) for line in result.stdout.splitlines())
    assert "there is no _C extension module" in report["pyseg"]
    assert torch.__version__ in report["torch"]
    assert report["extension modules"].strip().startswith("none in ")


def test_collect_env_reports_a_sound_installation(site):
    result = run(sys.executable, "-P", "-m", "pyseg.collect_env", cwd="/", PYTHONPATH=str(site))
    assert result.returncode == 0, result.stderr
    assert f"version {pyseg.__version__}" in result.stdout
    assert "failed" not in result.stdout


# ------------------------------------------------------------------------------------------ what CMake decides


def configure(folder: Path, *options: str, **environment: str) -> subprocess.CompletedProcess:
    scripts = sysconfig.get_path("scripts")
    path = os.pathsep.join([scripts, os.environ["PATH"]])
    command = ["cmake", "-G", "Ninja", "-S", ROOT, "-B", folder, f"-DPython_EXECUTABLE={sys.executable}", *options]
    return run(*command, PATH=path, **environment)


needs_cuda_torch = pytest.mark.skipif(torch.version.cuda is None, reason="cuda: this torch is a CPU build")


@needs_cuda_torch
def test_cuda_on_without_a_compiler_fails_clearly(tmp_path):
    result = configure(tmp_path, "-DPYSEG_CUDA=ON", CUDACXX="/nowhere/nvcc")
    assert result.returncode != 0
    assert "pyseg: PYSEG_CUDA=ON, but no CUDA compiler" in " ".join(result.stderr.split())


@needs_cuda_torch
def test_cuda_auto_says_why_not(tmp_path):
    result = configure(tmp_path, CUDACXX="/nowhere/nvcc")
    assert result.returncode == 0, result.stderr
    assert "pyseg: CUDA kernels are not built: no CUDA compiler" in result.stdout


@needs_cuda_torch
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="cuda: no nvcc")
def test_cuda_architectures_are_obeyed(tmp_path):
    result = configure(tmp_path, "-DPYSEG_CUDA=ON", "-DCMAKE_CUDA_ARCHITECTURES=80-virtual")
    assert result.returncode == 0, result.stderr
    assert "for 80-virtual (PYSEG_CUDA=ON" in result.stdout
    commands = (tmp_path / "compile_commands.json").read_text()
    assert "arch=compute_80,code=[compute_80]" in commands
    assert "sm_" not in commands
