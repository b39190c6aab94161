"""Checks that an import finds the packages that xLLM brings beside `xllm`, rather than others of the same names."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

HOME = Path(__file__).absolute().parent.parent  # site-packages, or a checkout
NAMES = ("backends", "graph", "serving", "cuda_ops", "npu_ops")


def check_own_packages() -> None:
    """Look each package up without importing it. Raises ImportError that names the file in the way and what to do.

    One that is not found at all is no matter of names: importing it says so by itself.
    """
    for name in NAMES:
        found = _find(name)
        if found is not None and not _is_own(found, name):
            raise ImportError(f"xllm needs its own package {name!r} ({HOME / name}), but Python finds {found} first. "
                              f"{_advice(found)}", name=name, path=str(found))


def _find(name: str) -> Path | None:
    """The file of a module, the folder of a package; of a loaded one its own."""
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:  # loaded, and made by hand: it says nothing of where it comes from
        return Path(f"sys.modules[{name!r}]")
    if spec is None:
        return None
    folders = spec.submodule_search_locations
    if folders is not None:  # the first one of a namespace package, which has no file
        return next(map(Path, folders), None)
    return Path(spec.origin or name)


def _is_own(found: Path, name: str) -> bool:
    """Links to one folder are the same folder."""
    return found == HOME / name or found.resolve() == (HOME / name).resolve()


def _advice(found: Path) -> str:
    folder = str(found.parent)
    if not getattr(sys.flags, "safe_path", False) and sys.path and str(Path(sys.path[0]).absolute()) == folder:
        flag = "-P" if sys.version_info >= (3, 11) else "-I"
        return f"Rename it, or run `python {flag}`, which does not look there for modules."
    return f"Rename it, or take {folder} off the module path (PYTHONPATH, sys.path)."
