"""How much memory the CPU can still give, and memory that is taken only when it is touched."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_MADV_POPULATE_WRITE = 23
ALIGNMENT_BYTES = 64  # one cache line, and the widest vector


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros whose pages the kernel maps at the first write (calloc); `torch.zeros` would touch all of them."""
    num_bytes = math.prod(shape) * dtype.itemsize
    raw = np.zeros(num_bytes + ALIGNMENT_BYTES, dtype=np.uint8)
    offset = -raw.ctypes.data % ALIGNMENT_BYTES
    return torch.from_numpy(raw[offset : offset + num_bytes]).view(dtype).view(shape)


def populate(memory: Tensor) -> None:
    """Have the kernel give every page of a contiguous tensor now, without changing its contents; others may use it
    meanwhile. Where the kernel cannot (before Linux 5.14), nothing happens: pages come at the first write, as ever.
    """
    start = -(-memory.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = memory.data_ptr() + memory.nbytes - start
    if sys.platform == "linux" and length > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_POPULATE_WRITE)


def available_bytes(root: Path = Path("/")) -> int:
    """Free memory as this process sees it: the machine's, or less where a control group limits it.

    root: where `proc` and `sys` are found.
    """
    machine = _machine_available(root / "proc/meminfo")
    return max(0, min([machine, *_cgroup_headrooms(root)]))


def _machine_available(meminfo: Path) -> int:
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")


def _cgroup_headrooms(root: Path) -> Iterator[int]:
    """Limit minus use for this process's control group and each of its parents, versions 1 and 2."""
    groups = root / "proc/self/cgroup"
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mount, limit, used = root / "sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            mount, limit, used = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        folder = mount / path.lstrip("/")
        while folder.is_relative_to(mount):  # inside a container the path may not exist; its parents do
            yield from _headroom(folder, limit, used)
            folder = folder.parent


def _headroom(folder: Path, limit: str, used: str) -> Iterator[int]:
    try:
        limit_text = (folder / limit).read_text().strip()
        used_bytes = int((folder / used).read_text())
        statistics = (folder / "memory.stat").read_text().split()
    except FileNotFoundError:
        return
    if limit_text != "max":
        counts = dict(zip(statistics[::2], statistics[1::2]))
        reclaimable = int(counts.get("inactive_file", 0))
        yield int(limit_text) - used_bytes + reclaimable
