"""`GraphCache`: captured graphs by key and buffer set, made when first needed, within a budget.

A step that has no graph runs eagerly and is counted with its reason; nothing that goes wrong here ends a step.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Generic, Protocol, TypeVar

from backends.backend import CapturedGraph, Capturer
from graph.buffers import StepMemory
from graph.key import GraphKey

_log = logging.getLogger(__name__)

# Reasons of the cache for an eager step; its callers have more.
CAPTURE_FAILED, OVER_BUDGET, CACHE_FULL = "capture_failed", "over_budget", "cache_full"
# In a full cache a key must be missed that often before another makes room. Chosen: a capture costs as much as many
# steps, so that keys in turns must not push each other out.
MISSES_BEFORE_EVICTION = 8


class Program(Protocol):
    """A step over static memory: what is captured for one key and set."""

    memory: StepMemory

    def prepare(self) -> None:
        """After the inputs were filled, before the capture and before each replay: what a graph cannot do itself."""
        ...

    def __call__(self) -> None:
        """Queue the work from `memory.inputs` to `memory.outputs`. Running it twice does no harm."""
        ...


P = TypeVar("P", bound=Program)


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphBudget:
    """What all captured graphs together may take. num_bytes None: no limit. Streams: see `Capturer.max_streams`."""

    num_graphs: int = 64
    num_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureOutcome:
    """What came of a capture. reason: why there is no graph, with details; "": there is one, of that size."""

    reason: str = ""
    details: str = ""
    num_bytes: int = 0
    num_streams: int = 0


Agree = Callable[[GraphKey, int, CaptureOutcome], CaptureOutcome]


@dataclass(slots=True)
class GraphCounters:
    """Totals; replays by the key's name, fallbacks (eager steps) by reason."""

    captures: int = 0
    evictions: int = 0
    replays: Counter[str] = field(default_factory=Counter)
    fallbacks: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True)
class _Entry(Generic[P]):
    program: P
    graph: CapturedGraph
    outcome: CaptureOutcome


class GraphCache(Generic[P]):
    """`build(key, set)` makes the program of a key over buffer set `set` of `num_sets`; sets are used in turn.

    One thread uses it. All graphs share one memory pool.

    Ranks that share a model must keep the same graphs, as exchanges are in them. They meet the same keys in the same
    order; whatever else decides is agreed on: `agree(key, set, outcome)` is called once after each capture, failed ones
    too, and returns what all ranks go by.
    """

    def __init__(self, capturer: Capturer, build: Callable[[GraphKey, int], P], *, budget: GraphBudget,
                 num_sets: int = 2, agree: Agree = lambda key, index, outcome: outcome):
        self._capturer, self._build, self._budget, self._num_sets = capturer, build, budget, num_sets
        self._agree = agree
        self._pool = capturer.make_pool()
        self._entries: OrderedDict[tuple[GraphKey, int], _Entry[P]] = OrderedDict()  # least recently used first
        self._refused: dict[GraphKey, str] = {}
        self._misses: Counter[GraphKey] = Counter()
        self.turn = 0  # the set that the next step uses; `run` moves it on, and its owner may
        self.num_bytes = self.num_streams = 0  # of all graphs
        self.counters = GraphCounters()

    def __len__(self) -> int:
        return len(self._entries)

    def fall_back(self, reason: str) -> None:
        """Count a step that runs eagerly."""
        self.counters.fallbacks[reason] += 1

    def run(self, key: GraphKey, fill: Callable[[P], None]) -> P | None:
        """Fill the next set and replay the key's graph over it, captured now if there is none.

        Returns the program, whose outputs are queued and stay until its set's next turn, or None: run the step
        eagerly; the reason is counted.
        """
        place = (key, self.turn)
        entry = self._entries.get(place)
        if entry is None and (reason := self._refusal(key)) is not None:
            self.fall_back(reason)
            return None
        program = entry.program if entry else self._build(key, self.turn)
        program.memory.buffers.wait()
        fill(program)
        program.memory.upload()
        program.prepare()
        entry = entry or self._capture(key, program)
        if entry is not None:
            entry.graph.replay()
            self._entries.move_to_end(place)
        program.memory.buffers.wait = self._capturer.fence()
        if entry is None:
            return None
        self.turn = (self.turn + 1) % self._num_sets
        self.counters.replays[key.name] += 1
        return program

    def clear(self) -> None:
        """Release all graphs."""
        while self._entries:
            self._release_oldest()

    def _refusal(self, key: GraphKey) -> str | None:
        if key in self._refused:
            return self._refused[key]
        if not self._is_full():
            return None
        self._misses[key] += 1
        return CACHE_FULL if self._misses[key] % MISSES_BEFORE_EVICTION else None

    def _is_full(self) -> bool:
        """Whether one more graph of the usual size would go beyond the budget."""
        return bool(self._entries) and self._exceeds(len(self._entries) + 1, self.num_bytes * (1 + 1 / len(self)),
                                                     self.num_streams * (1 + 1 / len(self)))

    def _exceeds(self, num_graphs: int, num_bytes: float, num_streams: float) -> bool:
        budget, max_streams = self._budget, self._capturer.max_streams
        return (num_graphs > budget.num_graphs or (budget.num_bytes is not None and num_bytes > budget.num_bytes)
                or (max_streams is not None and num_streams > max_streams))

    def _capture(self, key: GraphKey, program: P) -> _Entry[P] | None:
        """Capture a graph, evicting the least recently used ones for it. Returns None if that fails, or it does not fit
        by itself."""
        while self._is_full():
            self._evict()
        graph, outcome = self._try_to_capture(program)
        outcome = self._agree(key, self.turn, outcome)
        self.counters.captures += graph is not None
        if not outcome.reason and self._exceeds(1, outcome.num_bytes, outcome.num_streams):
            outcome = replace(outcome, reason=OVER_BUDGET,
                              details=f"{outcome.num_bytes} bytes, {outcome.num_streams} streams")
        if graph is None or outcome.reason:
            assert outcome.reason, "agreed on a graph that is not there"
            if graph is not None:
                graph.release()
            self._refuse(key, outcome.reason, outcome.details)
            return None
        entry = self._entries[key, self.turn] = _Entry(program, graph, outcome)
        self.num_bytes, self.num_streams = self.num_bytes + outcome.num_bytes, self.num_streams + outcome.num_streams
        while self._exceeds(len(self), self.num_bytes, self.num_streams):
            self._evict()
        return entry

    def _try_to_capture(self, program: P) -> tuple[CapturedGraph | None, CaptureOutcome]:
        try:
            graph = self._capturer.capture(program, pool=self._pool, memory=program.memory)
        except (RuntimeError, MemoryError) as error:
            return None, CaptureOutcome(reason=CAPTURE_FAILED, details=str(error))
        return graph, CaptureOutcome(num_bytes=graph.num_bytes, num_streams=graph.num_streams)

    def _refuse(self, key: GraphKey, reason: str, details: str) -> None:
        _log.warning("steps like %s run eagerly from now on (%s: %s)", key, reason, details)
        self._refused[key] = reason
        self.fall_back(reason)

    def _evict(self) -> None:
        self.counters.evictions += 1
        self._release_oldest()

    def _release_oldest(self) -> None:
        _, entry = self._entries.popitem(last=False)
        self.num_bytes, self.num_streams = (self.num_bytes - entry.outcome.num_bytes,
                                            self.num_streams - entry.outcome.num_streams)
        entry.program.memory.buffers.wait()
        entry.graph.release()
