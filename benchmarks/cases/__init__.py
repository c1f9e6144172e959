"""The benchmark cases: one module an operator, found by name; each offers `cases()` and may offer `FAMILY_NOTES`."""

import importlib
import pkgutil

from harness import Case


def all_cases() -> list[Case]:
    return [case for module in _modules() for case in module.cases()]


def family_notes() -> dict[str, str]:
    """Measured reasons for figures, by the summary's row."""
    return {group: note for module in _modules() for group, note in getattr(module, "FAMILY_NOTES", {}).items()}


def _modules() -> list:
    return [importlib.import_module(f"cases.{info.name}") for info in pkgutil.iter_modules(__path__)]
