"""`CpuVmm`: a `VmmDriver` by `memfd_create` and `mmap(MAP_FIXED)`. Linux only.

A pool is an anonymous file in memory, a page of it an offset, and mapping a page is mapping that part of the file: what
is written at one address is read at every other that shows the page. A run of neighbouring pages takes one call. See
mmap(2); each mapping counts towards vm.max_map_count, and the kernel merges neighbours.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backends.backend import BackendError

# Linux's numbers, as mmap(2) and sys/mman.h have them; Python's mmap module lacks some.
PROT_NONE, PROT_READ_WRITE = 0, 3
# The same of mmap's flags.
MAP_SHARED, MAP_PRIVATE, MAP_FIXED, MAP_ANONYMOUS, MAP_NORESERVE, MAP_POPULATE = 0x1, 0x2, 0x10, 0x20, 0x4000, 0x8000
FAILED = ctypes.c_void_p(-1).value
# Of vm.max_map_count (65,530 by default): left for libraries, allocators and thread stacks of this process, which go on
# making mappings of their own. Chosen: an eighth; running out would fail their calls.
MAPPINGS_MARGIN = 8192


def make_cpu_vmm() -> CpuVmm | None:
    """The driver, or None where this system has no such calls."""
    try:
        return CpuVmm()
    except BackendError:
        return None


class Pool:
    """The file behind `num_pages` pages of `page_bytes`."""

    def __init__(self, num_pages: int, page_bytes: int):
        self.num_pages, self.page_bytes = num_pages, page_bytes
        self.file = os.memfd_create("xllm-kv", os.MFD_CLOEXEC)
        os.ftruncate(self.file, num_pages * page_bytes)


class CpuVmm:
    """A `VmmDriver`. Raises BackendError where the system lacks the calls."""

    def __init__(self) -> None:
        if not sys.platform.startswith("linux") or not hasattr(os, "memfd_create"):
            raise BackendError(f"virtual memory management needs Linux's memfd_create; this is {sys.platform}")
        self.granularity_bytes = os.sysconf("SC_PAGE_SIZE")
        libc = ctypes.CDLL(None, use_errno=True)
        self._mmap, self._munmap = libc.mmap, libc.munmap
        self._mmap.restype = ctypes.c_void_p
        self._mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        self._munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

    def max_mappings(self) -> int | None:
        limit = int(Path("/proc/sys/vm/max_map_count").read_text())
        with Path("/proc/self/maps").open("rb") as lines:
            used = sum(1 for _ in lines)
        return max(0, limit - used - MAPPINGS_MARGIN)

    def reserve(self, num_bytes: int) -> int:
        return self._call(None, num_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)

    def create(self, num_pages: int, page_bytes: int) -> Pool:
        assert page_bytes % self.granularity_bytes == 0
        return Pool(num_pages, page_bytes)

    def map(self, address: int, pool: Any, first_page: int, num_pages: int, *, touch: bool = True) -> None:
        assert first_page >= 0 and first_page + num_pages <= pool.num_pages
        size = pool.page_bytes
        flags = MAP_SHARED | MAP_FIXED | (MAP_POPULATE if touch else 0)
        self._call(address, num_pages * size, PROT_READ_WRITE, flags, pool.file, first_page * size)

    def unmap(self, address: int, num_bytes: int) -> None:
        """See `VmmDriver.unmap`. Puts another reservation in its place: a hole could be taken by any other mapping."""
        flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED
        self._call(address, num_bytes, PROT_NONE, flags, -1, 0)

    def release(self, address: int, num_bytes: int) -> None:
        self._munmap(address, num_bytes)

    def destroy(self, pool: Any) -> None:
        os.close(pool.file)

    def tensor(self, address: int, num_bytes: int, dtype: torch.dtype, owner: object) -> Tensor:
        # A subclass, because plain arrays take no attributes.
        span_type: Any = type("Span", (ctypes.c_char * num_bytes,), {})
        span = span_type.from_address(address)
        span.owner = owner
        return torch.frombuffer(span, dtype=dtype)

    def _call(self, address: int | None, num_bytes: int, protection: int, flags: int, file: int, offset: int) -> int:
        got = self._mmap(address, num_bytes, protection, flags, file, offset)
        if got == FAILED:
            number = ctypes.get_errno()
            hint = " (vm.max_map_count?)" if number == errno.ENOMEM else ""
            raise MemoryError(f"mmap of {num_bytes} bytes failed: {os.strerror(number)}{hint}")
        return int(got)
