"""`Arena`: one reserved range of a device's virtual memory that holds all KV blocks and every row's view of them.

A page holds one block of *all* layers, part after part, layer by layer, padded up to what the device can map. Where
operators find both parts of a layer by one number, each part has a region of the range for itself (`Region`), and a
page is a piece of each. The first `num_blocks` pages show the physical blocks, for good; `XTensor` decides what the
others show. A page that shows nothing must not be touched (`backends/vmm.py`).
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backends.vmm import VmmDriver


def padded_bytes(num_bytes: int, driver: VmmDriver, unit: int = 1) -> int:
    """The size of a page that holds `num_bytes`, a multiple of `unit` bytes as well."""
    step = math.lcm(driver.granularity_bytes, unit)
    return -(-num_bytes // step) * step


@dataclass(frozen=True, slots=True)
class Region:
    """A page in one region of the range: so many bytes of memory, and so many from one page to the next, of which the
    rest shows nothing."""

    page_bytes: int
    stride_bytes: int

    @classmethod
    def dense(cls, page_bytes: int) -> Region:
        """Page after page."""
        return cls(page_bytes, page_bytes)


class Arena:
    """`num_pages` virtual pages over `num_blocks` physical ones. Range and memory are freed when the last view is
    dropped.

    regions: one, which holds all parts of all layers, or one for each part of a layer.
    Raises MemoryError if the range or the pools cannot be had.
    """

    def __init__(self, driver: VmmDriver, *, num_pages: int, num_blocks: int, regions: Sequence[Region]):
        assert num_pages >= num_blocks
        for region in regions:
            assert region.page_bytes % driver.granularity_bytes == region.stride_bytes % driver.granularity_bytes == 0
            assert region.page_bytes <= region.stride_bytes
        self.num_pages, self.driver, self._regions = num_pages, driver, tuple(regions)
        sizes = [num_pages * region.stride_bytes for region in regions]
        address = driver.reserve(sum(sizes))
        pools: list[Any] = []
        try:
            for region in regions:
                pools.append(driver.create(num_blocks, region.page_bytes))
        except BaseException:
            _free(driver, address, sum(sizes), pools)
            raise
        self._pools, self._addresses = pools, [address + before for before in accumulate(sizes[:-1], initial=0)]
        end = weakref.finalize(self, _free, driver, address, sum(sizes), pools)
        end.atexit = False  # the process ends anyway, and threads may still look
        self._show(0, 0, num_blocks, touch=False)

    @property
    def page_bytes(self) -> int:
        """Memory behind a page, in all regions together."""
        return sum(region.page_bytes for region in self._regions)

    def layers(self, block_shapes: Sequence[Sequence[tuple[int, ...]]], dtype: torch.dtype) -> list[tuple[Tensor, ...]]:
        """Each layer's parts as [num_pages, *block shape]: dense within a page, their region's stride apart.

        block_shapes: by layer, then by part.
        """
        if len(self._regions) == 1:
            views = self._views(0, [shape for parts in block_shapes for shape in parts], dtype)
            return [tuple(next(views) for _ in parts) for parts in block_shapes]
        by_part = [self._views(index, shapes, dtype) for index, shapes in enumerate(zip(*block_shapes, strict=True))]
        assert len(by_part) == len(self._regions), "a region for each part"
        return list(zip(*by_part, strict=True))

    def _views(self, index: int, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> Iterator[Tensor]:
        """One block of each shape behind the other in each page of a region."""
        region = self._regions[index]
        numbers = [math.prod(shape) for shape in shapes]
        assert sum(numbers) * dtype.itemsize <= region.page_bytes, "a page is too small for a block"
        flat = self.driver.tensor(self._addresses[index], self.num_pages * region.stride_bytes, dtype, self)
        stride = region.stride_bytes // dtype.itemsize
        for shape, first in zip(shapes, accumulate(numbers, initial=0), strict=False):
            inner = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
            yield flat.as_strided((self.num_pages, *shape), (stride, *inner), first)

    def map(self, pages_B: np.ndarray, blocks_B: np.ndarray) -> np.ndarray:
        """Map blocks at pages (both int64 [B], pages rising); returns the pages where the system refused."""
        refused = []
        for start, stop in _runs((np.diff(pages_B) != 1) | (np.diff(blocks_B) != 1), len(pages_B)):
            try:
                self._show(int(pages_B[start]), int(blocks_B[start]), stop - start)
            except MemoryError:
                refused.append(pages_B[start:stop])
        return np.concatenate(refused) if refused else pages_B[:0]

    def unmap(self, pages_B: np.ndarray) -> np.ndarray:
        """Unmap pages (int64 [B], rising); returns those where the system refused."""
        refused = []
        for start, stop in _runs(np.diff(pages_B) != 1, len(pages_B)):
            try:
                for region, address in zip(self._regions, self._addresses, strict=True):
                    self.driver.unmap(address + int(pages_B[start]) * region.stride_bytes,
                                      (stop - start) * region.stride_bytes)
            except MemoryError:  # it has to cut a mapping in two
                refused.append(pages_B[start:stop])
        return np.concatenate(refused) if refused else pages_B[:0]

    def _show(self, page: int, block: int, count: int, *, touch: bool = True) -> None:
        """Map neighbouring blocks at neighbouring pages; what lies between two pages of a region stays as it is."""
        for region, address, pool in zip(self._regions, self._addresses, self._pools, strict=True):
            run = count if region.stride_bytes == region.page_bytes else 1
            for done in range(0, count, run):
                self.driver.map(address + (page + done) * region.stride_bytes, pool, block + done, run, touch=touch)


def _runs(breaks: np.ndarray, length: int) -> list[tuple[int, int]]:
    """Cut [0, length) into (start, stop) pieces, after each i where `breaks[i]`."""
    if not length:
        return []
    return list(pairwise([0, *(np.flatnonzero(breaks) + 1).tolist(), length]))


def _free(driver: VmmDriver, address: int, num_bytes: int, pools: Sequence[Any]) -> None:
    driver.release(address, num_bytes)
    for pool in pools:
        driver.destroy(pool)
