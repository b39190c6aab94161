"""`RoutedInstance`: what a router knows of one instance of a cluster, but for its cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from xllm.routing.pace import StepPace, StepTiming
from xllm.routing.sent_requests import SentRequests

# What an instance has said is out of date after so long. Chosen: four beats of 0.5 s (`client/gate_wire.py`) missed.
STALE_S = 2.0
# In which what has been computed counts half for balance. Chosen: long enough for a conversation's next turn, so that
# what its first ones cost is not forgotten; short enough that load that is over is.
SPENT_HALF_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """What an instance says of itself: sequences that wait and run, KV blocks that are free or can be made so, and the
    steps since the last report (`engine/step_log.py:StepTiming`)."""

    num_waiting: int
    num_running: int
    num_free_blocks: int
    steps: Sequence[StepTiming] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """block_size: tokens of a KV block. max_waiting, max_open: requests that it takes into its queue, and in all.
    num_blocks: of the KV cache on its device."""

    block_size: int
    max_waiting: int
    max_open: int
    num_blocks: int


class RoutedInstance:
    """number: larger than those of all that joined before. `sent`: what was sent there. Not thread-safe."""

    def __init__(self, number: int, capacity: Capacity):
        self.number, self.capacity = number, capacity
        self.sent, self.pace = SentRequests(), StepPace()
        self.is_behind = False  # it is known that its cache is not known
        self.num_said_waiting = self._num_said_running = self._num_of_others = 0
        self._num_free_blocks = capacity.num_blocks
        self._heard_s: float | None = None
        self._spent, self._spent_s = 0.0, 0.0  # tokens; as of when

    def hear(self, report: LoadReport, now_s: float) -> None:
        """It has said how it is."""
        self.num_said_waiting, self._num_said_running = report.num_waiting, report.num_running
        self._num_of_others = max(0, report.num_waiting + report.num_running - self.sent.num_open)
        self._num_free_blocks, self._heard_s = report.num_free_blocks, now_s
        self.pace.note(report.steps)

    def is_stale(self, now_s: float) -> bool:
        """Whether what is known is out of date. It is not before the first report: it has just joined."""
        return self.is_behind or (self._heard_s is not None and now_s - self._heard_s > STALE_S)

    @property
    def num_open(self) -> int:
        """Requests that have not ended, and those that it seems to have of others."""
        return self.sent.num_open + self._num_of_others

    @property
    def num_queued(self) -> int:
        """Requests that wait there."""
        return max(self.sent.num_waiting, self.num_said_waiting)

    @property
    def num_running(self) -> int:
        """Sequences that run there."""
        return max(self.sent.num_open - self.sent.num_waiting, self._num_said_running)

    @property
    def free_tokens(self) -> int:
        """Room in its KV cache, less what waits to go in."""
        return max(0, self._num_free_blocks * self.capacity.block_size - self.sent.waiting_tokens)

    def is_full(self, num_requests: int) -> bool:
        """Whether it would refuse a call of so many requests."""
        return (self.num_queued + num_requests > self.capacity.max_waiting
                or self.num_open + num_requests > self.capacity.max_open)

    def spend(self, num_tokens: int, now_s: float) -> None:
        """So many tokens are to be computed there."""
        self._spent, self._spent_s = self.spent_tokens(now_s) + num_tokens, now_s

    def spent_tokens(self, now_s: float) -> float:
        """Tokens that were to be computed there of late."""
        return self._spent * 0.5 ** (max(0.0, now_s - self._spent_s) / SPENT_HALF_S)
