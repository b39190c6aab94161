"""`VirtualRows`: maps and unmaps the arena's pages as `XTensor` decides, ahead of the step that needs it.

A step's plan is submitted while the step before it still runs: then its pages are mapped (`prepare`, in the submitter's
thread, which would only wait otherwise). A page that the running step may still read is changed after that step
(`take`, in the runner's thread): one of a running row that is to show another block with the same contents.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from backends.backend import Backend
from xllm.config import EngineConfig
from xllm.errors import ConfigError, WorkerError
from xllm.kv.xtensor import StepMaps, XTensor
from xllm.parallel.groups import ALONE, Group
from xllm.runner.arena import Arena, Region
from xllm.step import ScheduleOutput

_log = logging.getLogger(__name__)

SLOTS = 2**31 - 1  # tokens that an int32 can number, as the operators do
# Chosen: address space costs nothing, and each range of an ended row may be the next turn of a conversation.
RANGES_PER_ROW = 4


def make_virtual_rows(config: EngineConfig, backend: Backend, *, num_blocks: int, regions: Sequence[Region],
                      pages_per_row: int, number_bytes: int, group: Group = ALONE) -> VirtualRows | None:
    """Make the rows of `--kv-layout xtensor`; None: rows run on block tables.

    regions: see `kv_cache.py:page_regions`. number_bytes: of one number of the cache. group: the ranks that share the
    model; all take what the poorest has. Raises ConfigError if so many addresses cannot be had, or are more than the
    device's operators can count.
    """
    if not uses_xtensor(config, backend):
        return None
    cache, num_rows = config.cache, config.scheduler.max_num_seqs
    assert backend.vmm is not None and cache.block_size is not None
    most_ranges = (SLOTS // cache.block_size - num_blocks) // pages_per_row
    if most_ranges < num_rows:
        raise ConfigError(f"kv_layout xtensor: {num_rows} sequences of {pages_per_row} blocks have more tokens than "
                          "slots can number; lower max_num_seqs or max_model_len")
    page_numbers = max(region.stride_bytes for region in regions) // number_bytes  # of the largest tensor
    most_pages = None if backend.max_cache_numbers is None else backend.max_cache_numbers // page_numbers
    if most_pages is not None:
        least = num_blocks + num_rows * pages_per_row
        if least > most_pages:
            raise ConfigError(
                f"kv_layout xtensor: {num_blocks} KV blocks and {num_rows} sequences of {pages_per_row} blocks are one "
                f"tensor of {least * page_numbers} numbers, and operators of {backend.name} count to "
                f"{backend.max_cache_numbers}: take kv_layout paged, or lower max_num_seqs, max_model_len and "
                f"num_kv_blocks so that their blocks are at most {most_pages}")
        most_ranges = min(most_ranges, (most_pages - num_blocks) // pages_per_row)
    num_ranges = _least(group, "ranges of KV pages", min(RANGES_PER_ROW * num_rows, most_ranges))
    num_pages = num_blocks + num_ranges * pages_per_row
    try:
        arena = Arena(backend.vmm, num_pages=num_pages, num_blocks=num_blocks, regions=regions)
    except MemoryError as error:
        raise ConfigError(f"kv_layout xtensor: {error}; lower max_num_seqs, max_model_len or the number of KV blocks, "
                          "or take kv_layout paged") from error
    limit = cache.xtensor_max_mappings
    if limit is None and (system_limit := backend.vmm.max_mappings()) is not None:
        limit = max(0, system_limit // len(regions) - num_ranges)  # the gap behind each range is one as well
        limit = _least(group, "mappings", limit)
    xtensor = XTensor(num_blocks=num_blocks, num_rows=num_rows, pages_per_row=pages_per_row, max_mappings=limit,
                      num_ranges=num_ranges)
    return VirtualRows(xtensor, arena, is_shared=group.size > 1)


def _least(group: Group, what: str, own: int) -> int:
    return min(map(int, group.vote(f"the number of {what}", str(own))))


def uses_xtensor(config: EngineConfig, backend: Backend) -> bool:
    """Whether the layout is asked for and the device has it; says so once if it has not."""
    if config.cache.kv_layout != "xtensor":
        return False
    if backend.vmm is None:
        _log.warning("%s has no virtual memory management: kv_layout xtensor runs on block tables", backend.name)
        return False
    return True


class VirtualRows:
    """An `XTensor` and its `Arena`. One thread submits (`prepare`), one runs (`take`).

    is_shared: other ranks have the same rows, and must run them on block tables in the same steps, as their graphs
    differ and exchanges are in them. So what is decided follows from the plans alone.
    """

    def __init__(self, xtensor: XTensor, arena: Arena, *, is_shared: bool = False):
        self.xtensor, self.arena, self._is_shared = xtensor, arena, is_shared
        self._submitted = (-1, -1)  # the step submitted last, and the one before it, which was done by then
        self._prepared: dict[int, StepMaps] = {}
        self._done_step = -1
        self._refused_G = np.zeros(xtensor.num_ranges, dtype=bool)
        self._refused_pages: deque[np.ndarray] = deque()  # not yet known to `xtensor`
        self._warned = False

    def prepare(self, plan: ScheduleOutput) -> None:
        """Map the pages that the step needs, except those that a step in flight may read. Called in the order of
        submission."""
        while self._refused_pages:
            self.xtensor.give_up(self._refused_pages.popleft())
        maps = self.xtensor.prepare(plan, self._submitted[1] if self._is_shared else self._done_step)
        self._submitted = plan.step, self._submitted[0]
        if len(maps.unmap_B):
            self._note_refused(self.arena.unmap(maps.unmap_B))
        if len(maps.map_B):
            self._note_refused(self.arena.map(maps.map_B, maps.blocks_B))
        if maps.base_S is None and not self._warned:
            self._warned = True
            _log.warning("more than %s mappings: sequences fall back to block tables", self.xtensor.max_mappings)
        self._prepared[plan.step] = maps

    def take(self, plan: ScheduleOutput, finish_last: Callable[[], None] = lambda: None) -> np.ndarray | None:
        """Do the step's remaining maps. Returns the page of each row's first block, int32 [S], or None: the step runs
        on block tables. The step before it must be done; `finish_last` is called to wait for it."""
        if plan.step not in self._prepared:
            self.prepare(plan)
        maps = self._prepared.pop(plan.step)
        if len(maps.late_B):
            finish_last()
            self._note_refused(self.arena.map(maps.late_B, maps.late_blocks_B))
        self._done_step = plan.step
        if maps.base_S is not None and self._refused_G[self._ranges(maps.base_S)].any():
            return None
        return maps.base_S

    def _ranges(self, pages: np.ndarray) -> np.ndarray:
        return (pages - self.xtensor.num_blocks) // self.xtensor.pages_per_row

    def _note_refused(self, pages: np.ndarray) -> None:
        """Note pages that the system refused to map in spite of the cap: their ranges are given up with the next
        `prepare`."""
        if len(pages):
            if self._is_shared:
                raise WorkerError(f"the system refused to map {len(pages)} KV pages, which other ranks may have mapped")
            self._refused_G[self._ranges(pages)] = True
            self._refused_pages.append(pages)
            _log.warning("the system refused to map %d KV pages: their sequences fall back to block tables", len(pages))
