"""`XTensor`: which contiguous virtual range each row has, and which physical block each of its pages shows.

The arena's pages, by number: the first `num_blocks` show the physical blocks themselves, for good; behind them lie
`num_ranges` ranges of `pages_per_row` pages. A row owns a range from admission to release, and page m of it shows the
row's block m, mapped on demand. Who holds which block stays the business of `BlockPool`: a prefix shared by rows is one
block shown in several ranges.

A range keeps its mappings when its row has ended. A new row takes the range that already shows most of its blocks, so
that a conversation's next turn, or a set of freed blocks that was handed on whole, needs no mapping at all.

A physical block is, as the xLLM technical report (section 4.3) has it,

    FREE        neither owned nor shown in any range
    ALLOCATED   owned by a row that does not show it (it runs on its block table)
    MAPPED      shown in the range of a row that owns it
    REUSABLE    shown only where its row has ended

Letters: G ranges, R rows, M pages per row, B pages changed in a step, S rows of a step.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from xllm.errors import IntegrityError
from xllm.step import ScheduleOutput

NONE = -1  # no row, or no range
UNMAPPED = -2  # a page that shows no block; -2 + 1 is no block either, so that it never seems to continue another

_NO_CELLS = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMaps:
    """What must be done to the arena for one step, in this order; pages are the arena's, int64 [B] in rising order.

    unmap_B: pages that show nothing any more. map_B, blocks_B: pages to map and the blocks they show; no step in
    flight reads them. late_B, late_blocks_B: the same, but a step in flight may read them: not before it is done.
    base_S: int32, the arena page of each row's first block; None: a row of the step runs on its block table, and
    so does the whole step.
    """

    base_S: np.ndarray | None
    unmap_B: np.ndarray = field(default_factory=lambda: _NO_CELLS)
    map_B: np.ndarray = field(default_factory=lambda: _NO_CELLS)
    blocks_B: np.ndarray = field(default_factory=lambda: _NO_CELLS)
    late_B: np.ndarray = field(default_factory=lambda: _NO_CELLS)
    late_blocks_B: np.ndarray = field(default_factory=lambda: _NO_CELLS)


@dataclass(slots=True)
class XTensorCounters:
    """Totals. pages_kept: pages that a row needed and that showed the right block already."""

    pages_mapped: int = 0
    pages_kept: int = 0
    pages_unmapped: int = 0
    late_pages: int = 0
    ranges_reused: int = 0
    fallbacks: int = 0


class XTensor:
    """The books of the arena's ranges; `prepare` is called with every plan, in order. Not thread-safe: it belongs to
    the thread that submits the steps.

    max_mappings: most mappings to hold at a time; pages that are neighbours in the range and in the pool are one.
    Beyond it ranges without a row are unmapped, the oldest first; if that is not enough, the row falls back to its
    block table until it ends. None: no limit.
    """

    def __init__(self, *, num_blocks: int, num_rows: int, pages_per_row: int, max_mappings: int | None = None,
                 num_ranges: int | None = None):
        self.num_blocks, self.pages_per_row = num_blocks, pages_per_row
        self.num_ranges = num_ranges or num_rows
        assert self.num_ranges >= num_rows, "every row may need a range"
        self.max_mappings = max_mappings
        self.counters = XTensorCounters()
        self.num_mapped = 0
        self._num_joints = 0  # places where a page continues the one before it
        # A column on either side, so that every page has neighbours.
        self._shown_GM = np.full((self.num_ranges, pages_per_row + 2), UNMAPPED, dtype=np.int32)
        self._shown = self._shown_GM.reshape(-1)
        self._row_of_G = np.full(self.num_ranges, NONE, dtype=np.int64)
        self._ended_G = np.zeros(self.num_ranges, dtype=np.int64)  # when its row left; 0: never used
        self._busy_step_G = np.full(self.num_ranges, -1, dtype=np.int64)  # changes wait for that step's late maps
        self._mapped_G = np.zeros(self.num_ranges, dtype=np.int64)
        self._usable_G = np.ones(self.num_ranges, dtype=bool)
        self._range_of_R = np.full(num_rows, NONE, dtype=np.int64)
        self._contiguous_R = np.zeros(num_rows, dtype=bool)
        self._num_pages_R = np.zeros(num_rows, dtype=np.int64)
        self._blocks_RM = np.zeros((num_rows, pages_per_row), dtype=np.int64)
        self._num_ended = 0
        self._step = self._done_step = -1  # of the plan being taken in
        self._unmapped: list[np.ndarray] = []  # cells

    @property
    def num_pages(self) -> int:
        """Pages of the arena."""
        return self.num_blocks + self.num_ranges * self.pages_per_row

    @property
    def num_mappings(self) -> int:
        """Mappings that the ranges need now."""
        return self.num_mapped - self._num_joints

    # --- a step

    def prepare(self, plan: ScheduleOutput, done_step: int = -1) -> StepMaps:
        """Take in the plan of the next step and return the maps that it needs; each plan once, in order.

        done_step: the last step whose late maps were made. Released rows take part in no step in flight.
        """
        for row in plan.released_rows:
            self._release(row)
        self._step, self._done_step, self._unmapped = plan.step, done_step, []
        late = self._replace(plan) if len(plan.replace_rows_C) else _NO_CELLS
        early = _NO_CELLS
        if plan.new_rows or len(plan.append_rows_B):
            rows, places, blocks = self._grow(plan)
            for new in plan.new_rows:
                self._enter(new.row, blocks[rows == new.row])
            cells = self._show(rows, places, blocks)
            busy = self._busy_step_G[self._ranges(cells)] > done_step
            early, late = cells[~busy], np.union1d(late, cells[busy])
        return self._step_maps(plan, early, late)

    def _step_maps(self, plan: ScheduleOutput, early: np.ndarray, late_B: np.ndarray) -> StepMaps:
        base_S = self._bases(plan.rows_S)
        if not len(early) and not len(late_B) and not self._unmapped:
            return StepMaps(base_S=base_S)
        early.sort()
        unmap_B = np.sort(np.concatenate(self._unmapped)) if self._unmapped else _NO_CELLS
        self._busy_step_G[self._ranges(late_B)] = plan.step
        self.counters.pages_mapped += len(early) + len(late_B)
        self.counters.late_pages += len(late_B)
        self.counters.pages_unmapped += len(unmap_B)
        return StepMaps(base_S=base_S, unmap_B=self._pages(unmap_B), map_B=self._pages(early),
                        blocks_B=self._shown[early], late_B=self._pages(late_B), late_blocks_B=self._shown[late_B])

    def _bases(self, rows_S: np.ndarray) -> np.ndarray | None:
        if not self._contiguous_R[rows_S].all():
            return None
        return (self.num_blocks + self._range_of_R[rows_S] * self.pages_per_row).astype(np.int32)

    def _pages(self, cells: np.ndarray) -> np.ndarray:
        """The arena pages of cells of `_shown`."""
        ranges, columns = np.divmod(cells, self._shown_GM.shape[1])
        return self.num_blocks + ranges * self.pages_per_row + columns - 1

    def _ranges(self, cells: np.ndarray) -> np.ndarray:
        return cells // self._shown_GM.shape[1]

    def _cells(self, ranges: np.ndarray, places: np.ndarray) -> np.ndarray:
        return ranges * self._shown_GM.shape[1] + places + 1

    def _grow(self, plan: ScheduleOutput) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All pages that the step adds to rows: rows, places in their tables, blocks."""
        new = plan.new_rows
        rows = np.concatenate((*(np.full(len(n.block_ids), n.row) for n in new), plan.append_rows_B)).astype(np.int64)
        blocks = np.concatenate((*(n.block_ids for n in new), plan.append_ids_B)).astype(np.int64)
        order = np.argsort(rows, kind="stable")
        rows, blocks = rows[order], blocks[order]
        places = self._num_pages_R[rows] + np.arange(len(rows)) - np.searchsorted(rows, rows)
        np.add.at(self._num_pages_R, rows, 1)
        self._blocks_RM[rows, places] = blocks
        return rows, places, blocks

    def _replace(self, plan: ScheduleOutput) -> np.ndarray:
        """Pages of running rows that are to show another block with the same contents."""
        rows, places = plan.replace_rows_C.astype(np.int64), plan.replace_places_C.astype(np.int64)
        blocks = plan.replace_ids_C.astype(np.int64)
        self._blocks_RM[rows, places] = blocks
        cells = _NO_CELLS
        for i, row in enumerate(rows.tolist()):
            one = slice(i, i + 1)
            if self._contiguous_R[row]:
                cells = np.union1d(cells, self._fit(row, self._cells(self._range_of_R[rows[one]], places[one]),
                                                    blocks[one]))
        return cells

    # --- rows come and go

    def _release(self, row: int) -> None:
        group = self._range_of_R[row]
        if group != NONE:
            self._give_back(int(group))
        self._range_of_R[row] = NONE
        self._contiguous_R[row] = False
        self._num_pages_R[row] = 0

    def _give_back(self, group: int) -> None:
        self._num_ended += 1
        self._row_of_G[group], self._ended_G[group] = NONE, self._num_ended

    def _enter(self, row: int, blocks: np.ndarray) -> None:
        """Give the row the free range that agrees with most of its blocks."""
        assert self._range_of_R[row] == NONE, f"row {row} has a range already"
        free = np.flatnonzero((self._row_of_G == NONE) & self._usable_G)
        if not len(free):  # ranges were given up
            self._fall_back(row)
            return
        agreeing = np.count_nonzero(self._shown_GM[free, 1 : 1 + len(blocks)] == blocks, axis=1)
        # Where none agrees, one that shows nothing, then the one that ended first: the others may still be of use.
        best = free[np.lexsort((self._ended_G[free], -agreeing))[0]]
        self.counters.ranges_reused += bool(agreeing.max() > 0)
        self._row_of_G[best], self._range_of_R[row], self._contiguous_R[row] = row, best, True

    def _fall_back(self, row: int) -> None:
        """Run the row on its block table until it ends. A step in flight may still read its range."""
        group = self._range_of_R[row]
        if group != NONE:
            self._give_back(int(group))
            self._busy_step_G[group] = self._step
        self._range_of_R[row] = NONE
        self._contiguous_R[row] = False
        self.counters.fallbacks += 1

    def give_up(self, pages: np.ndarray) -> None:
        """Stop using the ranges of these arena pages, which the system refused to map: their rows fall back to block
        tables until they end."""
        groups = np.unique((pages - self.num_blocks) // self.pages_per_row)
        self._usable_G[groups] = False
        for row in self._row_of_G[groups].tolist():
            if row != NONE and self._contiguous_R[row]:
                self._fall_back(row)

    # --- what pages show

    def _show(self, rows: np.ndarray, places: np.ndarray, blocks: np.ndarray) -> np.ndarray:
        """Note that the pages show the blocks; returns the cells that must be mapped for it."""
        wanted = self._contiguous_R[rows]
        if not wanted.all():
            rows, places, blocks = rows[wanted], places[wanted], blocks[wanted]
        cells = self._cells(self._range_of_R[rows], places)
        differs = self._shown[cells] != blocks
        self.counters.pages_kept += len(cells) - int(np.count_nonzero(differs))
        rows, cells, blocks = rows[differs], cells[differs], blocks[differs]
        # A page that changes can cut a run of three into three.
        if self.max_mappings is None or self.num_mappings + 2 * len(cells) <= self.max_mappings:
            self._store(cells, blocks)
            return cells
        parts = [self._fit(row, cells[rows == row], blocks[rows == row]) for row in np.unique(rows).tolist()]
        return np.concatenate(parts) if parts else _NO_CELLS

    def _fit(self, row: int, cells: np.ndarray, blocks: np.ndarray) -> np.ndarray:
        """Store one row's pages under the cap and return them; none if it falls back instead."""
        before = self._shown[cells]
        self._store(cells, blocks)
        while self.max_mappings is not None and self.num_mappings > self.max_mappings:
            victims = self._victims()
            if not len(victims):
                self._store(cells, before)
                self._fall_back(row)
                return _NO_CELLS
            self._store(victims, np.full(len(victims), UNMAPPED))
            self._unmapped.append(victims)
        return cells

    def _victims(self) -> np.ndarray:
        """Cells to unmap next: of the range that ended first, else what lies behind a running row's pages."""
        settled = self._usable_G & (self._busy_step_G <= self._done_step) & (self._mapped_G > 0)
        ended = np.flatnonzero((self._row_of_G == NONE) & settled)
        if len(ended):
            return self._mapped_cells(int(ended[np.argmin(self._ended_G[ended])]), 0)
        for group in np.flatnonzero((self._row_of_G != NONE) & settled).tolist():
            cells = self._mapped_cells(group, int(self._num_pages_R[self._row_of_G[group]]))
            if len(cells):
                return cells
        return _NO_CELLS

    def _mapped_cells(self, group: int, first_place: int) -> np.ndarray:
        shown = self._shown_GM[group, 1 + first_place : -1]
        return group * self._shown_GM.shape[1] + 1 + first_place + np.flatnonzero(shown != UNMAPPED)

    def _store(self, cells: np.ndarray, blocks: np.ndarray) -> None:
        """Write what cells show and keep the counts. Cells have no repeats."""
        if not len(cells):
            return
        shown = self._shown
        edges = np.unique(np.concatenate((cells, cells + 1)))  # each named by the page behind it
        joints = np.count_nonzero(shown[edges] == shown[edges - 1] + 1)
        change = (blocks != UNMAPPED).astype(np.int64) - (shown[cells] != UNMAPPED)
        shown[cells] = blocks
        self._num_joints += int(np.count_nonzero(shown[edges] == shown[edges - 1] + 1)) - int(joints)
        np.add.at(self._mapped_G, self._ranges(cells), change)
        self.num_mapped += int(change.sum())

    def check_integrity(self) -> None:
        """Raise IntegrityError if rows, ranges and counts disagree."""
        shown = self._shown_GM
        joints = int(np.count_nonzero(shown[:, 1:] == shown[:, :-1] + 1))
        mapped = int(np.count_nonzero(shown != UNMAPPED))
        _require((joints, mapped) == (self._num_joints, self.num_mapped), "the counts of mappings are wrong")
        in_ranges = np.count_nonzero(shown != UNMAPPED, axis=1)
        _require(np.array_equal(in_ranges, self._mapped_G), "the counts of mapped pages are wrong")
        _require(self.max_mappings is None or self.num_mappings <= self.max_mappings, "more mappings than allowed")
        _require(bool((shown[:, [0, -1]] == UNMAPPED).all()), "a page outside of its range is mapped")
        for row in np.flatnonzero(self._range_of_R != NONE).tolist():
            _require(self._row_of_G[self._range_of_R[row]] == row, f"row {row} and its range disagree")
        owners = self._row_of_G[self._row_of_G != NONE]
        _require(len(np.unique(owners)) == len(owners), "a row has two ranges")
        for row in np.flatnonzero(self._contiguous_R).tolist():
            count, group = int(self._num_pages_R[row]), int(self._range_of_R[row])
            same = np.array_equal(shown[group, 1 : 1 + count], self._blocks_RM[row, :count])
            _require(same, f"the range of row {row} does not show the row's blocks")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise IntegrityError(message)
