"""`GraphCache` against a slow model of it, and what happens when a capture fails or does not fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from backends.backend import CapturedGraph, GraphMemory
from graph.cache import MISSES_BEFORE_EVICTION, Agree, CaptureOutcome, GraphBudget, GraphCache
from graph.checking import CheckedGraph, CheckingCapturer, GraphCheckError
from graph.key import GraphKey
from tests.graph.steps import Lookup, compute, expected, key, make_set


class World:
    """A cache over steps of one size, told apart by what they end with."""

    def __init__(self, budget: GraphBudget | None = None, *, capturer: CheckingCapturer | None = None,
                 num_sets: int = 2, function: Callable[[Lookup], None] = compute, agree: Agree | None = None):
        self.sets = [make_set() for _ in range(num_sets)]
        self.capturer = capturer or CheckingCapturer()
        self.function = function
        self.built: list[tuple[GraphKey, int]] = []
        self.cache = GraphCache(self.capturer, self.build, budget=budget or GraphBudget(), num_sets=num_sets,
                                agree=agree or (lambda key, index, outcome: outcome))

    def build(self, key: GraphKey, index: int) -> Lookup:
        self.built.append((key, index))
        return Lookup(self.sets[index], key.num_tokens, self.function)

    def run(self, key: GraphKey, ids: list[int]) -> Lookup | None:
        return self.cache.run(key, lambda program: program.fill(ids))

    def check(self, key: GraphKey, ids: list[int]) -> bool:
        """Run a step; whether it went through a graph, whose result is then right."""
        program = self.run(key, ids)
        assert program is None or torch.equal(program.result(), expected(ids))
        return program is not None


def test_captured_once_for_each_set_and_then_replayed() -> None:
    world = World()
    for turn in range(8):
        assert world.check(key(4), [turn, 1])
    assert world.built == [(key(4), 0), (key(4), 1)]
    assert (world.cache.counters.captures, len(world.cache)) == (2, 2)
    assert world.cache.counters.replays == {"decode": 8}
    assert world.capturer.num_replays == 8
    assert world.check(key(4, "other"), [3])
    assert world.cache.counters.replays["decode-other"] == 1


class SlowModel:
    """What a cache with one set and room for `room` graphs does, written as plainly as can be."""

    def __init__(self, room: int):
        self.room, self.order, self.misses = room, [], {}

    def replays(self, name: str) -> bool:
        if name in self.order:
            self.order.remove(name)
            self.order.append(name)
            return True
        if len(self.order) == self.room:
            self.misses[name] = self.misses.get(name, 0) + 1
            if self.misses[name] % MISSES_BEFORE_EVICTION:
                return False
            self.order.pop(0)
        self.order.append(name)
        return True


@given(st.integers(1, 4), st.lists(st.sampled_from("abcdef"), max_size=120))
def test_the_least_recently_used_goes_and_nothing_thrashes(room: int, names: list[str]) -> None:
    world, model = World(GraphBudget(num_graphs=room), num_sets=1), SlowModel(room)
    for i, name in enumerate(names):
        assert world.check(key(4, name), [i % 11]) == model.replays(name)
        assert [k.ends_with for k, _ in world.cache._entries] == model.order
    counters = world.cache.counters
    assert counters.captures - counters.evictions == len(model.order)
    assert sum(counters.replays.values()) + counters.fallbacks["cache_full"] == len(names)


def test_bytes_bound_the_cache() -> None:
    world = World(num_sets=1)
    assert world.check(key(4, "a"), [1])
    one = world.cache.num_bytes
    small = World(GraphBudget(num_bytes=2 * one), num_sets=1)
    for name in "ab":
        assert small.check(key(4, name), [1])
    assert not small.check(key(4, "c"), [1])
    assert small.cache.num_bytes == 2 * one
    for _ in range(MISSES_BEFORE_EVICTION - 1):
        went = small.check(key(4, "c"), [1])
    assert went and [k.ends_with for k, _ in small.cache._entries] == ["b", "c"]
    assert small.cache.counters.evictions == 1


def test_a_large_graph_evicts_as_many_as_it_needs() -> None:
    world = World(num_sets=1)
    world.check(key(2), [1])
    small = world.cache.num_bytes
    tight = World(GraphBudget(num_bytes=5 * small), num_sets=1)
    for name in "abc":
        assert tight.check(key(2, name), [1])
    assert tight.check(key(8), [1, 2, 3])  # four times as large
    assert [k.num_tokens for k, _ in tight.cache._entries] == [2, 8]
    assert tight.cache.num_bytes <= 5 * small


def test_a_graph_that_alone_is_too_large_is_never_tried_again() -> None:
    world = World(GraphBudget(num_bytes=10))
    assert not any(world.check(key(4), [i]) for i in range(5))
    assert world.cache.counters.fallbacks == {"over_budget": 5}
    assert world.cache.counters.captures == 1
    assert len(world.built) == 1 and len(world.cache) == 0


def test_streams_bound_the_cache() -> None:
    world = World(capturer=CheckingCapturer(max_streams=3), num_sets=1)
    assert [world.check(key(4, name), [1]) for name in "abcd"] == [True, True, True, False]
    assert world.cache.num_streams == 3


class Failing(CheckingCapturer):
    """Raises for programs of a size, as a device does that cannot capture one."""

    def __init__(self, size: int, error: Exception):
        super().__init__()
        self._size, self._error = size, error

    def capture(self, function: Callable[[], None], *, pool: Any, memory: GraphMemory) -> CapturedGraph:
        graph = super().capture(function, pool=pool, memory=memory)
        if len(memory.inputs["ids"]) == self._size:
            raise self._error
        return graph


@pytest.mark.parametrize("error", [RuntimeError("operation not permitted"), MemoryError()], ids=repr)
def test_a_capture_that_fails_is_counted_and_not_repeated(error: Exception) -> None:
    world = World(capturer=Failing(4, error))
    assert [world.check(key(size), [1]) for size in (4, 2, 4, 4, 2)] == [False, True, False, False, True]
    assert world.cache.counters.fallbacks == {"capture_failed": 3}
    assert world.cache.counters.captures == 2
    assert [k for k, _ in world.built] == [key(4), key(2), key(2)]


def test_all_go_by_what_was_agreed_on() -> None:
    """One vote a capture. What failed elsewhere is not kept here; a graph counts as large as the largest."""
    votes: list[tuple[GraphKey, int, str]] = []

    def agree(key: GraphKey, index: int, outcome: CaptureOutcome) -> CaptureOutcome:
        votes.append((key, index, outcome.reason))
        if key.num_tokens == 2:
            return CaptureOutcome(reason="capture_failed", details="rank 1: no room")
        return replace(outcome, num_bytes=10**6)

    world = World(agree=agree)
    assert [world.check(key(size), [1]) for size in (4, 2, 4, 2, 4)] == [True, False, True, False, True]
    assert votes == [(key(4), 0, ""), (key(2), 1, ""), (key(4), 1, "")]
    assert world.cache.counters.fallbacks == {"capture_failed": 2}
    assert world.cache.num_bytes == 2 * 10**6
    world.cache.clear()
    assert world.cache.num_bytes == 0
    failing = World(capturer=Failing(4, MemoryError("here")), agree=agree)
    assert not failing.check(key(4), [1])
    assert votes[-1] == (key(4), 0, "capture_failed")


def test_a_failed_check_is_no_reason_to_go_on() -> None:
    def stale(step: Lookup) -> None:
        pass

    with pytest.raises(GraphCheckError, match="a row was not written"):
        World(function=stale).run(key(4), [1])


def test_prepared_before_the_capture_and_before_each_replay() -> None:
    counts: list[int] = []
    world = World(num_sets=1, function=lambda step: (counts.append(step.num_prepared), compute(step))[1])
    for i in range(3):
        world.check(key(1), [i])
    assert counts == [1, 1, 2, 3]


def test_clear_releases_everything() -> None:
    world = World()
    for size in (1, 2, 4):
        world.check(key(size), [1])
    graphs = [entry.graph for entry in world.cache._entries.values()]
    world.cache.clear()
    assert len(world.cache) == world.cache.num_bytes == 0
    for graph in graphs:
        with pytest.raises(GraphCheckError, match="released"):
            graph.replay()


class LateGraph:
    """Replays when the device gets to it."""

    def __init__(self, graph: CheckedGraph, queue: list[Callable[[], None]]):
        self.num_bytes, self.num_streams = graph.num_bytes, graph.num_streams
        self._graph, self._queue = graph, queue
        self.release = graph.release

    def replay(self) -> None:
        self._queue.append(self._graph.replay)


class Late(CheckingCapturer):
    """Work is done when a fence is waited for, as late as a device may do it. (It copies inputs at once, which is
    earlier than a device does: what is not safe here may be safe there, not the other way.)"""

    def __init__(self) -> None:
        super().__init__()
        self.queue: list[Callable[[], None]] = []

    def capture(self, function: Callable[[], None], *, pool: Any, memory: GraphMemory) -> CapturedGraph:
        return LateGraph(super().capture(function, pool=pool, memory=memory), self.queue)

    def fence(self) -> Callable[[], None]:
        num_queued = len(self.queue)
        return lambda: self.run_until(num_queued)

    def run_until(self, num: int) -> None:
        for i in range(num):
            if self.queue[i] is not _done:
                self.queue[i]()
                self.queue[i] = _done


def _done() -> None:
    pass


def test_a_step_is_filled_while_the_one_before_it_has_not_run() -> None:
    capturer = Late()
    world = World(capturer=capturer)
    steps = [[1], [2, 3], [4], [5, 6], [7]]
    waiting: list[tuple[Lookup, list[int]]] = []
    for ids in steps:
        program = world.run(key(2), ids)
        assert program is not None
        if waiting:  # the step before has its result only now
            before, before_ids = waiting.pop()
            before.memory.buffers.wait()
            before.memory.num_live = {"T": len(before_ids), "S": len(before_ids)}
            assert torch.equal(before.result(), expected(before_ids))
        waiting.append((program, ids))
    assert capturer.num_replays == len(steps) - 1


def test_one_set_waits_for_itself() -> None:
    """A set that is still in use is not overwritten, only waited for."""
    capturer = Late()
    world = World(capturer=capturer, num_sets=1)
    world.run(key(2), [1])
    world.run(key(2), [2])
    assert capturer.num_replays == 1
