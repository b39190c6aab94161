"""`Arena`: one reserved range of a device's virtual memory that holds all KV blocks and every row's view of them.

A page holds one block of *all* layers, part after part, layer by layer, padded up to what the device can map. The first
`num_blocks` pages show the physical blocks, for good; `XTensor` decides what the others show. A page that shows nothing
must not be touched (`backends/vmm.py`).
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backends.vmm import VmmDriver


def padded_bytes(num_bytes: int, driver: VmmDriver, unit: int = 1) -> int:
    """The size of a page that holds `num_bytes`, a multiple of `unit` bytes as well."""
    step = math.lcm(driver.granularity_bytes, unit)
    return -(-num_bytes // step) * step


class Arena:
    """`num_pages` virtual pages over `num_blocks` physical ones. Range and memory are freed when the last view is
    dropped.

    Raises MemoryError if the range or the pool cannot be had.
    """

    def __init__(self, driver: VmmDriver, *, num_pages: int, num_blocks: int, page_bytes: int):
        assert page_bytes % driver.granularity_bytes == 0 and num_pages >= num_blocks
        self.num_pages, self.page_bytes, self.driver = num_pages, page_bytes, driver
        self._address = driver.reserve(num_pages * page_bytes)
        try:
            self._pool = driver.create(num_blocks, page_bytes)
        except BaseException:
            driver.release(self._address, num_pages * page_bytes)
            raise
        end = weakref.finalize(self, _free, driver, self._address, num_pages * page_bytes, self._pool)
        end.atexit = False  # the process ends anyway, and threads may still look
        driver.map(self._address, self._pool, 0, num_blocks, touch=False)

    def layers(self, block_shapes: Sequence[Sequence[tuple[int, ...]]], dtype: torch.dtype) -> list[tuple[Tensor, ...]]:
        """Each layer's parts as [num_pages, *block shape]: dense within a page, `page_bytes` from page to page.

        block_shapes: by layer, then by part.
        """
        numbers = sum(math.prod(shape) for parts in block_shapes for shape in parts)
        assert numbers * dtype.itemsize <= self.page_bytes, "a page is too small for a block"
        flat = self.driver.tensor(self._address, self.num_pages * self.page_bytes, dtype, self)
        stride, first = self.page_bytes // dtype.itemsize, 0  # both in numbers

        def next_view(shape: tuple[int, ...]) -> Tensor:
            nonlocal first
            inner = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
            view = flat.as_strided((self.num_pages, *shape), (stride, *inner), first)
            first += math.prod(shape)
            return view

        return [tuple(next_view(shape) for shape in parts) for parts in block_shapes]

    def map(self, pages_B: np.ndarray, blocks_B: np.ndarray) -> np.ndarray:
        """Map blocks at pages (both int64 [B], pages rising); returns the pages where the system refused."""
        refused = []
        for start, stop in _runs((np.diff(pages_B) != 1) | (np.diff(blocks_B) != 1), len(pages_B)):
            try:
                self.driver.map(self._at(pages_B[start]), self._pool, int(blocks_B[start]), stop - start)
            except MemoryError:
                refused.append(pages_B[start:stop])
        return np.concatenate(refused) if refused else pages_B[:0]

    def unmap(self, pages_B: np.ndarray) -> np.ndarray:
        """Unmap pages (int64 [B], rising); returns those where the system refused."""
        refused = []
        for start, stop in _runs(np.diff(pages_B) != 1, len(pages_B)):
            try:
                self.driver.unmap(self._at(pages_B[start]), (stop - start) * self.page_bytes)
            except MemoryError:  # it has to cut a mapping in two
                refused.append(pages_B[start:stop])
        return np.concatenate(refused) if refused else pages_B[:0]

    def _at(self, page: Any) -> int:
        return self._address + int(page) * self.page_bytes


def _runs(breaks: np.ndarray, length: int) -> list[tuple[int, int]]:
    """Cut [0, length) into (start, stop) pieces, after each i where `breaks[i]`."""
    if not length:
        return []
    return list(pairwise([0, *(np.flatnonzero(breaks) + 1).tolist(), length]))


def _free(driver: VmmDriver, address: int, num_bytes: int, pool: Any) -> None:
    driver.release(address, num_bytes)
    driver.destroy(pool)
