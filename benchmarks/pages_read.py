"""Counts which pages of memory a computation reads."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

from backends.cpu.expert_kernels import PanelExperts

PAGE = mmap.PAGESIZE


class PagesRead:
    """Zeros of which no page is in memory until somebody reads it: the system then maps a page, and says so (mincore).

    Linux alone. The pages are small ones even where the system would give large ones.
    """

    def __init__(self, num_bytes: int):
        self._mapping = mmap.mmap(-1, -(-num_bytes // PAGE) * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            self._mapping.madvise(mmap.MADV_NOHUGEPAGE)
        self._memory: Tensor = torch.frombuffer(self._mapping, dtype=torch.uint8)

    @property
    def address(self) -> int:
        """Of the first page."""
        return self._memory.data_ptr()

    def pages(self) -> list[bool]:
        """Of each page, whether it was read since the start or since `forget`."""
        found = (ctypes.c_ubyte * (len(self._mapping) // PAGE))()
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mincore(ctypes.c_void_p(self.address), ctypes.c_size_t(len(self._mapping)), found):
            raise OSError(ctypes.get_errno(), "mincore")
        return [bool(flags & 1) for flags in found]

    def num_bytes(self) -> int:
        """Of the pages that were read."""
        return sum(self.pages()) * PAGE

    def forget(self) -> None:
        """Give the pages back; their contents are zeros still."""
        self._mapping.madvise(mmap.MADV_DONTNEED)


def watch_experts(packed: PanelExperts) -> PagesRead:
    """Put zeros in the place of the weights of packed experts (`PanelExperts`), one expert behind the other at whole
    pages, so that the pages tell which are read. Scales stay as they are."""
    experts = packed.experts
    size = -(-experts[0].tensors[0].nbytes // PAGE) * PAGE
    watched = PagesRead(size * len(experts))
    for number, struct in enumerate(packed.array):
        struct.weight = watched.address + number * size
    return watched
