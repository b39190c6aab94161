"""`XTensor` plan by plan: which range a row gets, what is mapped when, and what happens at the cap."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from tests.kv.xtensor_audit import ALLOCATED, FREE, MAPPED, REUSABLE, block_states, shown_at
from xllm.errors import IntegrityError
from xllm.kv.xtensor import UNMAPPED, StepMaps, XTensor
from xllm.request import SamplingParams
from xllm.step import NewRow, ScheduleOutput

NUM_BLOCKS, PAGES = 20, 6


class Plans:
    """Feeds an XTensor with plans made by hand."""

    def __init__(self, num_rows: int = 3, max_mappings: int | None = None, num_ranges: int | None = None):
        self.xtensor = XTensor(num_blocks=NUM_BLOCKS, num_rows=num_rows, pages_per_row=PAGES, max_mappings=max_mappings,
                               num_ranges=num_ranges)
        self.num_steps = 0
        self.done_step: int | None = None  # None: always the step before

    def step(self, rows: Sequence[int] = (), *, new: dict[int, list[int]] | None = None,
             append: Sequence[tuple[int, int]] = (), replace: Sequence[tuple[int, int, int]] = (),
             released: Sequence[int] = ()) -> StepMaps:
        """new: the blocks of rows that enter. append: (row, block). replace: (row, place, block)."""
        def ints(values: Sequence) -> np.ndarray:
            return np.array(values, dtype=np.int32)

        entering = tuple(NewRow(row=row, request_id=str(row), token_ids=ints([1]), num_prompt_tokens=1,
                                num_computed_tokens=0, block_ids=ints(blocks), sampling=SamplingParams(),
                                eos_token_ids=(), seed=0) for row, blocks in (new or {}).items())
        appended, replaced = ints(append).reshape(-1, 2), ints(replace).reshape(-1, 3)
        nothing = np.zeros(len(rows), dtype=np.int32)
        plan = ScheduleOutput(step=self.num_steps, rows_S=ints(rows), num_tokens_S=nothing, max_drafts_S=nothing,
                              samples_S=nothing > 0, new_rows=entering, released_rows=tuple(released),
                              append_rows_B=appended[:, 0], append_ids_B=appended[:, 1], replace_rows_C=replaced[:, 0],
                              replace_places_C=replaced[:, 1], replace_ids_C=replaced[:, 2])
        maps = self.xtensor.prepare(plan, self.num_steps - 1 if self.done_step is None else self.done_step)
        self.num_steps += 1
        self.xtensor.check_integrity()
        return maps

    def state_of(self, *blocks: int) -> list[int]:
        return block_states(self.xtensor)[list(blocks)].tolist()


def maps_of(maps: StepMaps) -> dict[int, int]:
    return dict(zip(maps.map_B.tolist(), maps.blocks_B.tolist()))


def late_of(maps: StepMaps) -> dict[int, int]:
    return dict(zip(maps.late_B.tolist(), maps.late_blocks_B.tolist()))


def base_of(maps: StepMaps) -> int:
    assert maps.base_S is not None and maps.base_S.dtype == np.int32 and len(maps.base_S) == 1
    return int(maps.base_S[0])


def test_pages_are_mapped_as_blocks_come() -> None:
    plans = Plans()
    maps = plans.step([1], new={1: [4, 5]}, append=[(1, 9)])
    base = base_of(maps)
    assert base >= NUM_BLOCKS and (base - NUM_BLOCKS) % PAGES == 0
    assert maps_of(maps) == {base: 4, base + 1: 5, base + 2: 9}
    assert maps_of(plans.step([1])) == {}
    maps = plans.step([1], append=[(1, 2), (1, 7)])
    assert base_of(maps) == base and maps_of(maps) == {base + 3: 2, base + 4: 7}
    assert shown_at(plans.xtensor, [3, base, base + 4, base + 5]) == [3, 4, 7, UNMAPPED]


def test_two_rows_show_one_block() -> None:
    plans = Plans()
    maps = plans.step([0, 1], new={0: [3, 4], 1: [3, 8]})
    assert sorted(maps.blocks_B.tolist()) == [3, 3, 4, 8]
    assert maps.base_S is not None and len(set(maps.base_S.tolist())) == 2


def test_states() -> None:
    plans = Plans(max_mappings=3)
    plans.step([0], new={0: [3, 4, 8]})
    assert plans.state_of(3, 4, 8, 5) == [MAPPED, MAPPED, MAPPED, FREE]
    plans.step([1], new={1: [3, 10, 12]})  # too many mappings
    assert plans.state_of(3, 10, 12) == [MAPPED, ALLOCATED, ALLOCATED]
    plans.step([1], released=[0])
    assert plans.state_of(3, 4, 8) == [ALLOCATED, REUSABLE, REUSABLE]
    plans.step([2], new={2: [3, 12]}, released=[1])
    assert plans.state_of(3, 4, 8, 12) == [MAPPED, FREE, REUSABLE, MAPPED]  # block 8: behind the row's own pages


def test_the_next_turn_needs_no_mapping() -> None:
    plans = Plans()
    first = base_of(plans.step([0], new={0: [3, 4, 8]}))
    plans.step([1], new={1: [5, 6]})
    maps = plans.step([2], new={2: [3, 4, 8]}, append=[(2, 9)], released=[0])
    assert base_of(maps) == first and maps_of(maps) == {first + 3: 9}
    assert plans.xtensor.counters.pages_kept == 3 and plans.xtensor.counters.ranges_reused == 1


def test_a_row_takes_the_range_that_agrees_longest() -> None:
    plans = Plans()
    bases = [base_of(plans.step([row], new={row: blocks})) for row, blocks in enumerate([[1, 2], [1, 2, 3], [1, 9]])]
    maps = plans.step([2], new={2: [1, 2, 3, 4]}, released=[0, 1, 2])
    assert base_of(maps) == bases[1] and maps_of(maps) == {bases[1] + 3: 4}


def test_freed_blocks_handed_on_whole_are_still_shown() -> None:
    """As the pool's stack gives them back: in order, to whoever needs as many; the rest of them while it grows."""
    plans = Plans()
    base = base_of(plans.step([0], new={0: []}, append=[(0, 7), (0, 8), (0, 2)]))
    maps = plans.step([1], new={1: []}, append=[(1, 7), (1, 8)], released=[0])
    assert base_of(maps) == base and maps_of(maps) == {}
    assert maps_of(plans.step([1], append=[(1, 2)])) == {}


def test_a_stranger_takes_an_unused_range_then_the_oldest() -> None:
    plans = Plans(num_rows=1, num_ranges=3)
    first = base_of(plans.step([0], new={0: [1]}))
    second = base_of(plans.step([0], new={0: [2]}, released=[0]))
    third = base_of(plans.step([0], new={0: [3]}, released=[0]))
    assert len({first, second, third}) == 3
    maps = plans.step([0], new={0: [4]}, released=[0])
    assert base_of(maps) == first and maps_of(maps) == {first: 4}
    assert base_of(plans.step([0], new={0: [3]}, released=[0])) == third


# --- what a step in flight may read


def test_replaced_pages_wait_for_their_step() -> None:
    plans = Plans()
    base = base_of(plans.step([0], new={0: [4, 5]}))
    maps = plans.step([0], replace=[(0, 1, 9)], append=[(0, 6)])
    assert late_of(maps) == {base + 1: 9} and maps_of(maps) == {base + 2: 6}
    assert plans.state_of(5, 9) == [FREE, MAPPED]


def test_a_range_with_late_maps_changes_no_earlier_than_they_are_made() -> None:
    """Else the late map of a row that ended meanwhile would overwrite what its successor reads."""
    plans = Plans(num_rows=1)
    plans.done_step = -1  # no step has had its turn yet
    base = base_of(plans.step([0], new={0: [4, 5]}))
    plans.step(replace=[(0, 1, 9)])
    maps = plans.step([0], new={0: [4, 7]}, released=[0])
    assert maps_of(maps) == {} and late_of(maps) == {base + 1: 7}
    plans.done_step = 2
    assert maps_of(plans.step([0], append=[(0, 8)])) == {base + 2: 8}


def test_a_range_that_was_fallen_back_from_is_not_touched_under_the_step_that_reads_it() -> None:
    plans = Plans(num_rows=3, max_mappings=2)
    plans.done_step = -1
    base = base_of(plans.step([0], new={0: [4, 6]}))
    maps = plans.step([0], append=[(0, 9)])
    assert maps.base_S is None and not len(maps.unmap_B)
    maps = plans.step([1], new={1: [1]})
    assert maps.base_S is None and not len(maps.unmap_B)  # it could have the room only from that range
    plans.done_step = 2
    maps = plans.step([2], new={2: [1]})
    assert maps.unmap_B.tolist() == [base, base + 1] or late_of(maps) or maps_of(maps)
    assert maps.base_S is not None


# --- the cap


def test_neighbours_in_the_pool_are_one_mapping() -> None:
    plans = Plans(max_mappings=2)
    assert plans.step([0], new={0: [4, 5, 6, 7]}).base_S is not None
    assert plans.xtensor.num_mappings == 1
    assert plans.step([0], append=[(0, 2)]).base_S is not None
    assert plans.step([0], append=[(0, 3)]).base_S is not None
    assert plans.xtensor.num_mappings == 2
    assert plans.step([0], replace=[(0, 1, 9)]).base_S is None  # would cut one in three
    assert plans.xtensor.num_mappings == 2


def test_ended_ranges_are_unmapped_first_and_the_oldest_of_them() -> None:
    plans = Plans(num_rows=3, max_mappings=4)
    bases = [base_of(plans.step([row], new={row: blocks})) for row, blocks in enumerate([[1, 3], [5], [7]])]
    plans.step([0], released=[2])
    plans.step([0], released=[1])
    maps = plans.step([0], append=[(0, 9)])
    assert maps.unmap_B.tolist() == [bases[2]] and maps_of(maps) == {bases[0] + 2: 9}
    assert base_of(maps) == bases[0]
    assert shown_at(plans.xtensor, [bases[1], bases[2]]) == [5, UNMAPPED]


def test_then_what_lies_behind_running_rows() -> None:
    plans = Plans(num_rows=2, max_mappings=4)
    base = base_of(plans.step([0], new={0: [1, 3, 5, 7]}))
    plans.step([1], new={1: [1]}, released=[0])
    maps = plans.step([0], new={0: [9, 11]})
    assert maps.unmap_B.tolist() == [base + 1, base + 2, base + 3]
    assert len(maps.map_B) == 2 and maps.base_S is not None


def test_the_rest_falls_back_and_the_others_do_not() -> None:
    plans = Plans(num_rows=3, max_mappings=3)
    plans.step([0], new={0: [1, 3]})
    assert plans.step([0, 1], new={1: [5, 7]}).base_S is None
    assert plans.xtensor.counters.fallbacks == 1
    assert plans.step([0]).base_S is not None
    assert plans.step([1], append=[(1, 9)]).base_S is None
    plans.step([0], released=[1])
    assert plans.step([0, 2], new={2: [5]}).base_S is not None  # a new row in its place
    assert plans.xtensor.counters.fallbacks == 1


def test_no_mapping_at_all() -> None:
    plans = Plans(max_mappings=0)
    maps = plans.step([0, 1], new={0: [1], 1: []}, append=[(1, 2)])
    assert maps.base_S is None and not len(maps.map_B)
    assert plans.xtensor.num_mappings == 0


def test_ranges_that_the_system_refused_are_given_up() -> None:
    plans = Plans(num_rows=2)
    base = base_of(plans.step([0], new={0: [1, 2]}))
    plans.xtensor.give_up(np.array([base + 1]))
    assert plans.xtensor.counters.fallbacks == 1
    assert plans.step([0], append=[(0, 3)]).base_S is None
    other = base_of(plans.step([1], new={1: [1, 2]}))
    assert other != base
    plans.step([0], new={0: [1, 2]}, released=[0])
    assert plans.step([0]).base_S is None  # no other is left


def test_the_audit_notices() -> None:
    plans = Plans()
    base = base_of(plans.step([0], new={0: [4, 5]}))
    plans.xtensor._shown_GM[(base - NUM_BLOCKS) // PAGES, 2] = 6
    with pytest.raises(IntegrityError):
        plans.xtensor.check_integrity()
