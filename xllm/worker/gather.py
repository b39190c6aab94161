"""`Gatherer`: passes an answer that every rank must give on to the engine once, when the last rank has given it, and
notices ranks that do something else than the others.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace

import numpy as np

from xllm.errors import IntegrityError, WorkerError
from xllm.kv.moves import PATIENT, STORE_LANES, TRANSFERS, URGENT, Move, MoveDone, StoredBlocks
from xllm.step import StepCheck, StepOutput
from xllm.worker.failures import as_failed
from xllm.worker.messages import (
    AdapterRead,
    Done,
    Failed,
    GrammarDone,
    Loaded,
    LoadProgress,
    Settled,
    StepBegun,
    WorkerCommand,
    WorkerReport,
    digest_drawn,
)

LOADED, ADAPTER, GRAMMAR, DONE, MOVE = "Loaded", "adapter", "grammar", "done", "move"
BEGUN, STEP = "begun", "step"  # compared by their order: all ranks do the same steps, one after the other
_NAMES = {LOADED: "loading", ADAPTER: "reading an adapter", GRAMMAR: "compiling a grammar", DONE: "what it was told",
          MOVE: "copying KV blocks"}


@dataclass(slots=True)
class _Pending:
    """One answer that is not complete: what each rank has sent of it, in order, and when the first of them did."""

    by_rank: list[deque[WorkerReport]]
    since_s: float
    missing: set[int] = field(default_factory=set)


class Gatherer:
    """Sorts the reports of `num_ranks` ranks. A rank's answers to one question come in the order of the questions."""

    def __init__(self, num_ranks: int, clock: Callable[[], float] = time.monotonic):
        self._num_ranks, self._clock = num_ranks, clock
        self._pending: dict[tuple[str, Hashable], _Pending] = {}
        self._progress_s = [clock()] * num_ranks  # when a rank last told how far it is with loading
        self._patient: set[int] = set()  # numbers of moves that no request waits for
        self._unbounded: set[int] = set()  # and of those that may take any time
        self._waiting_s = [0.0] * num_ranks  # in an exchange, by the ranks' last signs of life

    def note_sent(self, command: WorkerCommand) -> None:
        """Take note of a command that is sent to all ranks."""
        if isinstance(command, Move) and command.lane in PATIENT and command.priority > URGENT:
            self._patient.add(command.number)
        if isinstance(command, Move) and command.lane in (*STORE_LANES, *TRANSFERS):
            self._unbounded.add(command.number)

    def note_exchange(self, rank: int, waiting_s: float) -> None:
        """Take note of how long a rank has been waiting in an exchange."""
        self._waiting_s[rank] = waiting_s

    def absent_ranks(self, limit_s: float) -> tuple[set[int], float] | None:
        """(the ranks that are in no exchange, for how many seconds others have waited in one for them), if that is
        longer than `limit_s`; else None."""
        longest_s = max(self._waiting_s)
        absent = {rank for rank, waiting_s in enumerate(self._waiting_s) if waiting_s < longest_s / 2}
        return (absent, longest_s) if absent and longest_s > limit_s else None

    def add(self, rank: int, report: WorkerReport) -> WorkerReport | None:
        """Take in a report of `rank`. Returns what the engine is to get now, or None: load phases from rank 0 only, a
        failure at once with its rank's number, any other answer merged from all ranks when the last has given its
        own. Raises WorkerError where ranks do not do the same."""
        if self._num_ranks == 1:
            return report
        if isinstance(report, Failed):
            return Failed(report.kind, f"rank {rank}: {report.message}")
        if isinstance(report, LoadProgress):
            self._progress_s[rank] = self._clock()
            return report if rank == 0 else None
        key = _key(report)
        pending = self._pending.get(key)
        if pending is None:
            pending = self._pending[key] = _Pending([deque() for _ in range(self._num_ranks)], self._clock(),
                                                    set(range(self._num_ranks)))
        pending.by_rank[rank].append(report)
        pending.missing.discard(rank)
        return None if pending.missing else self._complete(key, pending)

    def _complete(self, key: tuple[str, Hashable], pending: _Pending) -> WorkerReport | None:
        reports = [by_rank.popleft() for by_rank in pending.by_rank]
        pending.missing = {rank for rank, by_rank in enumerate(pending.by_rank) if not by_rank}
        if len(pending.missing) == self._num_ranks:
            del self._pending[key]
            if key[0] == MOVE:
                self._patient.discard(reports[0].number)  # type: ignore[union-attr]
                self._unbounded.discard(reports[0].number)  # type: ignore[union-attr]
        pending.since_s = self._clock()
        return _merge(reports)

    def late_ranks(self, limit_s: float, patience_s: float) -> tuple[str, set[int], float] | None:
        """The ranks that are behind the first with an answer by more than `limit_s`, or `patience_s` for what no
        request waits for: (what they have not done, those ranks, by how many seconds), or None. Progress in loading
        counts as an answer; a move of the shared store may take any time."""
        now = self._clock()
        for (kind, number), pending in self._pending.items():
            if kind == MOVE and number in self._unbounded:
                continue
            is_patient = kind in (LOADED, ADAPTER) or (kind == MOVE and number in self._patient)
            since_s = max(pending.since_s, *(self._progress_s[rank] for rank in pending.missing))
            if now - since_s > (patience_s if is_patient else limit_s):
                return self._said(kind, pending), pending.missing, now - since_s
        return None

    def _said(self, kind: str, pending: _Pending) -> str:
        """What is not finished, as the object of "has not"."""
        if kind not in (BEGUN, STEP):
            return f"finished {_NAMES[kind]}"
        first = next(by_rank[0] for by_rank in pending.by_rank if by_rank)
        assert isinstance(first, (StepBegun, StepOutput, Settled))
        return f"{'begun' if kind == BEGUN else 'finished'} step {first.step}"


def _key(report: WorkerReport) -> tuple[str, Hashable]:
    if isinstance(report, StepBegun):
        return BEGUN, None
    if isinstance(report, (StepOutput, Settled)):
        return STEP, None
    if isinstance(report, GrammarDone):
        return GRAMMAR, report.spec
    if isinstance(report, AdapterRead):
        return ADAPTER, report.number
    if isinstance(report, Done):
        return DONE, report.what
    if isinstance(report, MoveDone):
        return MOVE, report.number
    return LOADED, None


def _merge(reports: list[WorkerReport]) -> WorkerReport | None:
    """One answer of all ranks': rank 0's, where they agree; the first error, if there is one."""
    first = reports[0]
    if isinstance(first, StepBegun):
        compare_begun({rank: r for rank, r in enumerate(reports) if isinstance(r, StepBegun)})
        return None
    if isinstance(first, StepOutput):
        return _merge_steps(first, reports[1:])
    if isinstance(first, Loaded):
        return _merge_loaded(first, [r for r in reports if isinstance(r, Loaded)])
    if isinstance(first, MoveDone):
        done = [r for r in reports if isinstance(r, MoveDone)]
        return MoveDone(first.number, min(r.num_done for r in done), max(r.busy_s for r in done),
                        max(r.wait_s for r in done),
                        next((replace(r.error, message=f"rank {rank}: {r.error.message}")
                              for rank, r in enumerate(done) if r.error is not None), None))
    if isinstance(first, (GrammarDone, AdapterRead, Done)):
        failed = [r for r in reports if isinstance(r, (GrammarDone, AdapterRead, Done)) and r.error is not None]
        if failed:
            return failed[0]
    if isinstance(first, AdapterRead) and len({r.digest for r in reports if isinstance(r, AdapterRead)}) > 1:
        return replace(first, error=Failed("ModelError", "the ranks read different files: they changed meanwhile"))
    return first


def _merge_loaded(first: Loaded, reports: list[Loaded]) -> Loaded:
    """What every rank has: the blocks and slots of the poorest one, and of those stored on disk what all have."""
    num_blocks = min(r.num_blocks for r in reports)
    facts = [r.tiers for r in reports if r.tiers is not None]
    if not facts:
        return replace(first, num_blocks=num_blocks)
    num_disk_slots = min(f.num_disk_slots for f in facts)
    in_all = set.intersection(*({_entry(f.stored, i) for i in range(len(f.stored.slots))} for f in facts))
    stored = facts[0].stored
    kept = np.array([i for i in range(len(stored.slots)) if stored.slots[i] < num_disk_slots
                     and _entry(stored, i) in in_all], dtype=np.intp)
    windows = tuple(window for f in facts for window in f.windows)
    tiers = replace(facts[0], windows=windows, num_host_slots=min(f.num_host_slots for f in facts),
                    num_disk_slots=num_disk_slots,
                    stored=StoredBlocks(stored.slots[kept], stored.digests[kept], stored.parents[kept]))
    return replace(first, num_blocks=num_blocks, tiers=tiers)


def _entry(stored: StoredBlocks, index: int) -> tuple[int, bytes, bytes]:
    return int(stored.slots[index]), stored.digests[index].tobytes(), stored.parents[index].tobytes()


def compare_begun(by_rank: dict[int, StepBegun]) -> None:
    """Raise WorkerError where a rank is about to compute something else than the first. Their exchanges would add up
    what does not belong together; of different sizes, they end a process, and not always the one that is wrong."""
    first = min(by_rank)
    for rank, found in by_rank.items():
        for name, ours, theirs in zip(StepBegun.__slots__, _fields(by_rank[first]), _fields(found), strict=True):
            if ours == theirs:
                continue
            if name == "step":
                raise WorkerError(f"worker rank {rank} has begun step {theirs} where rank {first} has begun step "
                                  f"{ours}")
            what = "token ids or positions" if name == "inputs" else f"{name} ({theirs!r})"
            than = f"rank {first}" if name == "inputs" else f"rank {first} ({ours!r})"
            raise WorkerError(f"worker rank {rank} has begun step {found.step} with other {what} than {than}")


def _fields(begun: StepBegun) -> list[object]:
    return [getattr(begun, name) for name in StepBegun.__slots__]


def _merge_steps(output: StepOutput, others: list[WorkerReport]) -> WorkerReport:
    drawn = digest_drawn(output)
    for rank, other in enumerate(others, 1):
        assert isinstance(other, Settled)
        if other.step != output.step:
            raise WorkerError(f"worker rank {rank} has finished step {other.step} where rank 0 has finished step "
                              f"{output.step}")
        if output.check is not None and other.check is not None:
            try:
                _compare(output.step, rank, output.check, other.check)
            except IntegrityError as error:
                return as_failed(error)
        if other.drawn != drawn:
            raise WorkerError(f"worker rank {rank} has drawn other tokens in step {output.step} than rank 0")
    return output


def _compare(step: int, rank: int, expected: StepCheck, found: StepCheck) -> None:
    """Raise IntegrityError where a rank did not compute what rank 0 did."""
    if not np.array_equal(expected.blocks_B, found.blocks_B):
        raise IntegrityError(f"step {step}: rank {rank} filled the KV blocks {found.blocks_B.tolist()}, rank 0 "
                             f"{expected.blocks_B.tolist()}")
    wrong = found.blocks_B[expected.digests_B != found.digests_B]
    if len(wrong):
        raise IntegrityError(f"step {step}: rank {rank} has other contents in KV block {int(wrong[0])} than rank 0")
    if expected.ids != found.ids:
        raise IntegrityError(f"step {step}: rank {rank} sampled other tokens than rank 0")
