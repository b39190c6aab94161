"""Tells how much memory the CPU can still give, and makes tensors whose memory is taken only when it is touched."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from backends.control_groups import ROOT, memory_headrooms

_MADV_POPULATE_WRITE = 23  # linux's number for it (since 5.14); Python's mmap module does not have it
ALIGNMENT_BYTES = 64  # one cache line, and the widest vector


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of zeros whose pages the kernel provides at the first write (calloc); `torch.zeros` would touch all of
    them."""
    num_bytes = math.prod(shape) * dtype.itemsize
    raw = np.zeros(num_bytes + ALIGNMENT_BYTES, dtype=np.uint8)
    offset = -raw.ctypes.data % ALIGNMENT_BYTES
    return torch.from_numpy(raw[offset : offset + num_bytes]).view(dtype).view(shape)


def populate(memory: Tensor) -> None:
    """Have the kernel provide every page of a contiguous tensor now, without changing its contents; others may use it
    meanwhile. Where the kernel cannot (before Linux 5.14), nothing happens: pages come at the first write."""
    start = -(-memory.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = memory.data_ptr() + memory.nbytes - start
    if sys.platform == "linux" and length > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_POPULATE_WRITE)


def available_bytes(root: Path = ROOT) -> int:
    """Free memory as this process sees it: the machine's, or less where a control group or its own limit of address
    space (`ulimit -v`) is tighter.

    root: where `proc` and `sys` are found.
    """
    machine = _machine_available(root / "proc/meminfo")
    return max(0, min([machine, *memory_headrooms(root), *_address_space_left(root / "proc/self/statm")]))


def _address_space_left(statm: Path) -> Iterator[int]:
    """The limit minus what is mapped, in bytes, if there is one."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY and statm.exists():
        yield limit - int(statm.read_text().split()[0]) * mmap.PAGESIZE


def _machine_available(meminfo: Path) -> int:
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
