"""The devices behind one interface (`backend.py`). `get_backend` makes one by name; its module is imported only
then.
"""

from __future__ import annotations

from pathlib import Path

import torch

from backends.backend import Backend, BackendError
from backends.place import ALONE, Place

NAMES = ("auto", "cpu", "cuda", "npu")
NPU_MANAGER = Path("/dev/davinci_manager")  # there with Ascend's driver


def get_backend(name: str, *, cache_dir: Path | None = None, compiled: bool = True, check_contracts: bool = False,
                place: Place = ALONE) -> Backend:
    """Make the backend called `name`; "auto" is the best one here.

    cache_dir: where compiled kernels are kept; None: built anew for this process. compiled: False runs plain torch
    only. check_contracts: see `NpuBackend`. place: which device, where several processes
    share a model; the CPU is one for all. Raises BackendError for a name that is unknown, or whose device or
    libraries are missing; the message says which.
    """
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        return _cuda(place)
    if name == "npu" or (name == "auto" and NPU_MANAGER.exists()):
        from backends.npu import NpuBackend

        return NpuBackend(check_contracts=check_contracts, place=place)
    if name in ("auto", "cpu"):
        from backends.cpu.cpu import CpuBackend

        return CpuBackend(cache_dir=cache_dir, compiled=compiled)
    raise BackendError(f"unknown device {name!r}; known are {', '.join(NAMES)}")


def _cuda(place: Place) -> Backend:
    try:
        from backends.cuda import CudaBackend
    except ImportError as error:
        raise BackendError(f"the cuda backend needs triton, which cannot be imported: {error}") from error
    return CudaBackend(place)
