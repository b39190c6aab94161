"""A slow arena under the real `VirtualRows`, driven by the real scheduler.

It knows what every page shows and which pages a step in flight may read, and notices a page that is changed under a
step, read without being mapped, or that shows another block than the row's table says. Steps run when their result is
asked for, long after they were planned and prepared: the widest overlap there is.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np

from tests.kv.xtensor_audit import ALLOCATED, FREE, MAPPED, REUSABLE, block_states
from tests.scheduler.harness import VOCAB, Simulation
from tests.scheduler.memory_runner import LateExecutor, MemoryRunner
from xllm.engine.core import StepLoop
from xllm.kv.xtensor import XTensor
from xllm.runner.virtual_rows import VirtualRows
from xllm.step import ScheduleOutput, StepOutput

NOTHING = -7


class SlowArena:
    """`Arena` as a dictionary. That share of the calls fails and leaves its pages undefined."""

    def __init__(self, rng: random.Random, refusals: float = 0.0):
        self.shows: dict[int, int] = {}
        self.in_use: set[int] = set()  # pages that a step in flight may read
        self.num_refused = 0
        self._rng, self._refusals = rng, refusals

    def map(self, pages_B: np.ndarray, blocks_B: np.ndarray) -> np.ndarray:
        assert (np.diff(pages_B) > 0).all()
        return self._change(pages_B, blocks_B.tolist())

    def unmap(self, pages_B: np.ndarray) -> np.ndarray:
        return self._change(pages_B, [NOTHING] * len(pages_B))

    def _change(self, pages_B: np.ndarray, shown: list[int]) -> np.ndarray:
        assert not self.in_use & set(pages_B.tolist()), "a page was changed under a running step"
        if self._rng.random() < self._refusals:
            self.num_refused += 1
            self.shows |= dict.fromkeys(pages_B.tolist(), NOTHING)
            return pages_B
        self.shows |= dict(zip(pages_B.tolist(), shown))
        return pages_B[:0]

    def num_mappings(self) -> int:
        mapped = {page: block for page, block in self.shows.items() if block != NOTHING}
        return len(mapped) - sum(mapped.get(page - 1) == block - 1 for page, block in mapped.items())


class VirtualRunner(MemoryRunner):
    """Checks at each step that its rows' pages show their blocks."""

    def __init__(self, num_rows: int, num_blocks: int, block_size: int, virtual: VirtualRows, arena: SlowArena):
        super().__init__(num_rows, num_blocks, block_size, VOCAB)
        self.virtual, self.arena = virtual, arena
        self.planned: dict[int, list[int]] = {}  # tables as they will be after all submitted steps
        self.num_steps = self.num_on_tables = 0
        self._reads: dict[int, set[int]] = {}  # by step
        self.twin: VirtualRows | None = None  # another rank's, which is ahead: it has run all that it was given

    def prepare(self, plan: ScheduleOutput) -> None:
        self._look_ahead(plan)
        self.virtual.prepare(plan)
        if self.twin is not None:
            self.twin.prepare(plan)
            ours, theirs = (rows._prepared[plan.step].base_S for rows in (self.virtual, self.twin))
            assert np.array_equal(ours, theirs), f"step {plan.step}: other ranges, or tables on one rank only"
            self.twin.take(plan)
        self.virtual.xtensor.check_integrity()
        self._check_states()
        self._reads[plan.step] = self._pages_read(plan)
        self.arena.in_use = set().union(*self._reads.values())

    def _look_ahead(self, plan: ScheduleOutput) -> None:
        for row in plan.released_rows:
            del self.planned[row]
        for new in plan.new_rows:
            self.planned[new.row] = new.block_ids.tolist()
        for row, place, block in zip(plan.replace_rows_C, plan.replace_places_C, plan.replace_ids_C):
            self.planned[int(row)][int(place)] = int(block)
        for row, block in zip(plan.append_rows_B.tolist(), plan.append_ids_B.tolist()):
            self.planned[row].append(block)

    def _pages_read(self, plan: ScheduleOutput) -> set[int]:
        maps = self.virtual._prepared[plan.step]
        if maps.base_S is None:
            return set()
        return {base + m for base, row in zip(maps.base_S.tolist(), plan.rows_S.tolist())
                for m in range(len(self.planned[row]))}

    def _check_states(self) -> None:
        xtensor = self.virtual.xtensor
        owned = {block for table in self.planned.values() for block in table}
        mapped = {b for row, table in self.planned.items() if xtensor._contiguous_R[row] for b in table}
        shown = {int(b) for b in xtensor._shown[xtensor._shown >= 0]}
        for block, state in enumerate(block_states(xtensor).tolist()):
            wanted = (MAPPED if block in mapped else ALLOCATED if block in owned
                      else REUSABLE if block in shown else FREE)
            assert state == wanted, f"block {block} is {state}, not {wanted}"

    def run(self, plan: ScheduleOutput) -> StepOutput:
        del self._reads[plan.step]  # its own late maps are made before it reads
        self.arena.in_use = set()  # the step before is done, and no other has begun
        self.base_S = self.virtual.take(plan)
        self.arena.in_use = set().union(*self._reads.values())
        self.num_steps += 1
        return super().run(plan)

    def _forward(self, plan: ScheduleOutput) -> None:
        if self.base_S is None:
            self.num_on_tables += 1
        else:
            for base, row in zip(self.base_S.tolist(), plan.rows_S.tolist()):
                shown = [self.arena.shows.get(base + m, NOTHING) for m in range(len(self.tables[row]))]
                assert shown == self.tables[row], f"step {plan.step}: row {row} reads the wrong pages"
        super()._forward(plan)


class PreparingExecutor(LateExecutor):
    def send(self, plan: ScheduleOutput) -> None:
        self.runner.prepare(plan)
        super().send(plan)


class VirtualSimulation(Simulation):
    """The simulation of the scheduler's tests on the xtensor layout."""

    def __init__(self, num_blocks: int, *, rng: random.Random, refusals: float = 0.0, max_mappings: int | None = None,
                 more_ranges: int = 0, is_shared: bool = False, **settings: Any):
        super().__init__(num_blocks, **settings)
        num_rows, block_size = self.config.scheduler.max_num_seqs, self.config.cache.block_size
        assert block_size and self.config.model.max_model_len
        pages_per_row = -(-(self.config.model.max_model_len + 1) // block_size)

        def make_rows(arena: SlowArena) -> VirtualRows:
            xtensor = XTensor(num_blocks=num_blocks, num_rows=num_rows, max_mappings=max_mappings,
                              pages_per_row=pages_per_row, num_ranges=num_rows + more_ranges)
            return VirtualRows(xtensor, arena, is_shared=is_shared)  # type: ignore[arg-type]

        self.arena = SlowArena(rng, refusals)
        virtual = make_rows(self.arena)
        self.xtensor = virtual.xtensor
        self.runner = VirtualRunner(num_rows, num_blocks, block_size, virtual, self.arena)
        if is_shared:
            self.runner.twin = make_rows(SlowArena(random.Random(0), 0.0))
        self.loop = StepLoop(self.scheduler, PreparingExecutor(self.runner, self.loop.steps.depth))
