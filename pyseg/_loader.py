"""Loads the extension modules: the only file that imports `_C` and `_C_cuda`.

`_C` defines the operators and holds the CPU kernels; `_C_cuda` adds the CUDA kernels and is loaded only where torch was
built for the CUDA major version that it was compiled for. Loading either does not initialise CUDA.
"""

import importlib
import importlib.machinery
from pathlib import Path
from types import ModuleType

try:
    import torch  # brings libtorch into the process, which the extension modules are linked with
except ImportError as error:
    raise ImportError(f"pyseg needs torch 2.11 or later, but importing torch failed: {error}") from error

MINIMUM_TORCH = "2.11"
_FOLDER = Path(__file__).parent
_REBUILD = "build it with `pip install .`, or `make dev` in a source tree; `python -m pyseg.collect_env` shows more"


def _diagnose(name: str, error: ImportError) -> str:
    """One sentence on why the extension module `name` could not be imported."""
    found = sorted(path.name for path in _FOLDER.glob(f"{name}.*") if path.suffix in (".so", ".pyd", ".dylib"))
    usable = {name + suffix for suffix in importlib.machinery.EXTENSION_SUFFIXES}
    if not found:
        return f"there is no {name} extension module in {_FOLDER}: {_REBUILD}"
    if usable.isdisjoint(found):
        wanted = name + importlib.machinery.EXTENSION_SUFFIXES[0]
        return f"{', '.join(found)} was built for another Python, this one needs {wanted}: {_REBUILD}"
    if "undefined symbol" in str(error) and "pyseg" not in str(error).split("undefined symbol")[1]:
        return f"{name} does not fit torch {torch.__version__} in {Path(torch.__file__).parent} ({error}): {_REBUILD}"
    return f"{name} is there but does not load ({error}): {_REBUILD}"


def _load(name: str) -> ModuleType:
    try:
        return importlib.import_module(f"pyseg.{name}")
    except ImportError as error:
        raise ImportError(f"pyseg cannot be used: {_diagnose(name, error)}") from error


def _why_no_cuda(built: str, running: str | None) -> str:
    """Why `_C_cuda`, compiled with CUDA version `built`, is not for a torch with CUDA `running`; empty if it is."""
    if not built:
        return "not built"
    if not running:
        return f"torch {torch.__version__} is a CPU build"
    if built.split(".")[0] != running.split(".")[0]:
        return f"built with CUDA {built}, torch {torch.__version__} has CUDA {running}"
    return ""


if torch.__version__ < MINIMUM_TORCH:
    raise ImportError(
        f"pyseg needs torch {MINIMUM_TORCH} or later, found torch {torch.__version__} in {Path(torch.__file__).parent}"
    )

_C = _load("_C")
try:
    _C.cpu_capability()
except RuntimeError as error:  # a PYSEG_CPU_CAPABILITY that does not exist or that this machine lacks
    raise ImportError(f"pyseg cannot be used: {error}") from error

why_no_cuda = _why_no_cuda(_C.cuda_version, torch.version.cuda)
_C_cuda = None if why_no_cuda else _load("_C_cuda")
