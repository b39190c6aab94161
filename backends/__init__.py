"""Devices behind one face. `get_backend` is the closed registry; a backend is imported when asked for."""

from __future__ import annotations

from pathlib import Path

from backends.backend import Backend, BackendError

NAMES = ("auto", "cpu", "cuda", "npu")


def get_backend(name: str, *, cache_dir: Path | None = None, compiled: bool = True) -> Backend:
    """The backend called `name`; "auto" is the best one here.

    cache_dir: where compiled kernels are kept; None: built anew for this process.
    compiled: False runs plain torch only.
    Raises BackendError for a name that is unknown or whose backend does not exist in this version.
    """
    if name in ("auto", "cpu"):
        from backends.cpu import CpuBackend

        return CpuBackend(cache_dir=cache_dir, compiled=compiled)
    if name in NAMES:
        raise BackendError(f"the {name} backend is not built yet in this version; use --device cpu")
    raise BackendError(f"unknown device {name!r}; known are {', '.join(NAMES)}")
