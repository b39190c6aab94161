"""`StepLog`: records how long the engine's steps took and how many tokens they computed."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from dataclasses import dataclass, field

# Steps in one report. Chosen: all steps of a beat of 0.25 s unless they take less than a millisecond.
MAX_STEPS_A_BEAT = 256
StepTiming = tuple[float, float, int, int]  # end on the `time.monotonic()` clock, seconds, tokens computed, sequences
STEP_COLUMNS = ("end_s", "seconds", "num_tokens", "num_seqs")

# Bounds of the buckets. Fine below 10 ms, where a fast device's step lies.
STEP_TIME_S = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3,
               0.5, 0.75, 1.0, 2.5, 5.0, 10.0)
# Bounds of the buckets, in tokens: powers of two, as the sizes of steps are.
STEP_TOKENS = (1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0)


@dataclass(slots=True)
class Buckets:
    """A histogram's data: one count per bound (not cumulative), one more for values above all bounds, and the sum of
    the values."""

    counts: list[int]
    sum: float = 0.0

    def observe(self, value: float, bounds: tuple[float, ...]) -> None:
        """Add a value. bounds: the upper bounds of the buckets, rising; a value on a bound belongs below it."""
        self.counts[bisect_left(bounds, value)] += 1
        self.sum += value


def _empty(bounds: tuple[float, ...]) -> Buckets:
    return Buckets([0] * (len(bounds) + 1))


@dataclass(slots=True)
class StepReport:
    """Totals since the start, and each step since the last report, the newest `MAX_STEPS_A_BEAT` of them."""

    time_s: Buckets = field(default_factory=lambda: _empty(STEP_TIME_S))
    tokens: Buckets = field(default_factory=lambda: _empty(STEP_TOKENS))
    recent: list[StepTiming] = field(default_factory=list)


class StepLog:
    """Written by the step loop's thread, read by the heartbeat's.

    The totals are read as they are: a reader may see one step in one histogram and not yet in the other.
    """

    def __init__(self) -> None:
        self._time_s, self._tokens = _empty(STEP_TIME_S), _empty(STEP_TOKENS)
        self._recent: deque[StepTiming] = deque(maxlen=MAX_STEPS_A_BEAT)

    def note(self, end_s: float, time_s: float, num_tokens: int, num_seqs: int) -> None:
        """Add a step. end_s: on the `time.monotonic()` clock; time_s: seconds; num_seqs: rows."""
        self._time_s.observe(time_s, STEP_TIME_S)
        self._tokens.observe(num_tokens, STEP_TOKENS)
        self._recent.append((end_s, time_s, num_tokens, num_seqs))

    def take(self) -> StepReport:
        """The totals, and the steps since the last call, the newest `MAX_STEPS_A_BEAT` of them."""
        recent = []
        while self._recent:  # popleft and append are atomic, iterating is not
            recent.append(self._recent.popleft())
        return StepReport(Buckets(list(self._time_s.counts), self._time_s.sum),
                          Buckets(list(self._tokens.counts), self._tokens.sum), recent)
