"""`Gatherer`: passes an answer that every rank must give on to the engine once, when the last rank has given it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace

import numpy as np

from xllm.errors import IntegrityError
from xllm.kv.moves import MoveDone, StoredBlocks
from xllm.step import StepCheck, StepOutput
from xllm.worker.failures import as_failed
from xllm.worker.messages import AdapterRead, Done, Failed, GrammarDone, Loaded, LoadProgress, Settled, WorkerReport

LOADED = "Loaded"  # ranks may load at different speeds


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
        self._pending: dict[Hashable, _Pending] = {}

    def add(self, rank: int, report: WorkerReport) -> WorkerReport | None:
        """Take in a report of `rank`. Returns what the engine is to get now, or None: load phases from rank 0 only, a
        failure at once with its rank's number, any other answer merged from all ranks when the last has given its
        own."""
        if self._num_ranks == 1:
            return report
        if isinstance(report, Failed):
            return Failed(report.kind, f"rank {rank}: {report.message}")
        if isinstance(report, LoadProgress):
            return report if rank == 0 else None
        key = _key(report)
        pending = self._pending.get(key)
        if pending is None:
            pending = self._pending[key] = _Pending([deque() for _ in range(self._num_ranks)], self._clock(),
                                                    set(range(self._num_ranks)))
        pending.by_rank[rank].append(report)
        pending.missing.discard(rank)
        return None if pending.missing else self._complete(key, pending)

    def _complete(self, key: Hashable, pending: _Pending) -> WorkerReport:
        reports = [by_rank.popleft() for by_rank in pending.by_rank]
        pending.missing = {rank for rank, by_rank in enumerate(pending.by_rank) if not by_rank}
        if len(pending.missing) == self._num_ranks:
            del self._pending[key]
        pending.since_s = self._clock()
        return _merge(reports)

    def late_ranks(self, step_s: float, answer_s: float) -> tuple[str, set[int], float] | None:
        """The ranks that are behind the first by more than `step_s` for a step, or `answer_s` for any other answer but
        loading: (what is not finished, those ranks, by how many seconds), or None."""
        now = self._clock()
        for key, pending in self._pending.items():
            late_s = now - pending.since_s
            if key != LOADED and late_s > (step_s if isinstance(key, int) else answer_s):
                what = f"step {key}" if isinstance(key, int) else "what it was told"
                return what, pending.missing, late_s
        return None


def _key(report: WorkerReport) -> Hashable:
    if isinstance(report, (StepOutput, Settled)):
        return report.step
    if isinstance(report, GrammarDone):
        return report.spec
    if isinstance(report, AdapterRead):
        return "adapter", report.number
    if isinstance(report, Done):
        return "done", report.what
    if isinstance(report, MoveDone):
        return "move", report.number
    return type(report).__name__  # LOADED


def _merge(reports: list[WorkerReport]) -> WorkerReport:
    """One answer of all ranks': rank 0's, where they agree; the first error, if there is one."""
    first = reports[0]
    if isinstance(first, StepOutput):
        return _merge_steps(first, reports[1:])
    if isinstance(first, Loaded):
        return _merge_loaded(first, [r for r in reports if isinstance(r, Loaded)])
    if isinstance(first, MoveDone):
        done = [r for r in reports if isinstance(r, MoveDone)]
        return MoveDone(first.number, min(r.num_done for r in done), max(r.busy_s for r in done),
                        max(r.wait_s for r in done), next((r.error for r in done if r.error is not None), None))
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
    tiers = replace(facts[0], num_host_slots=min(f.num_host_slots for f in facts), num_disk_slots=num_disk_slots,
                    stored=StoredBlocks(stored.slots[kept], stored.digests[kept], stored.parents[kept]))
    return replace(first, num_blocks=num_blocks, tiers=tiers)


def _entry(stored: StoredBlocks, index: int) -> tuple[int, bytes, bytes]:
    return int(stored.slots[index]), stored.digests[index].tobytes(), stored.parents[index].tobytes()


def _merge_steps(output: StepOutput, others: list[WorkerReport]) -> WorkerReport:
    for rank, other in enumerate(others, 1):
        assert isinstance(other, Settled)
        if output.check is not None and other.check is not None:
            try:
                _compare(output.step, rank, output.check, other.check)
            except IntegrityError as error:
                return as_failed(error)
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
