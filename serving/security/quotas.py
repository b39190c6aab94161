"""`Quota`: how many requests and tokens a caller may use per minute, as token buckets (RFC 2697's, continuous)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable


class Bucket:
    """Holds up to `per_minute`, and refills at that rate. The level may fall below zero: what a request costs is
    known only when it has run, and the debt delays the next one."""

    def __init__(self, per_minute: int, clock: Callable[[], float]):
        self.per_minute = per_minute
        self._clock = clock
        self._level, self._filled_s = float(per_minute), clock()

    def level(self) -> float:
        now_s = self._clock()
        gained = (now_s - self._filled_s) * self.per_minute / 60.0
        self._level, self._filled_s = min(float(self.per_minute), self._level + gained), now_s
        return self._level

    def wait_s(self, amount: float) -> float:
        """How long until so much is there; 0: it is."""
        return max(0.0, amount - self.level()) * 60.0 / self.per_minute

    def take(self, amount: float) -> None:
        self._level = self.level() - amount


class Quota:
    """A caller's two buckets; None: without limit. For one event loop: nothing here is locked.

    A request needs one whole request and any positive number of tokens. It pays for its prompt when it is handed to
    the engine and for its output as it comes.
    """

    def __init__(self, requests_per_minute: int | None = None, tokens_per_minute: int | None = None, *,
                 clock: Callable[[], float] = time.monotonic):
        self.limits = (requests_per_minute, tokens_per_minute)
        self._requests = None if requests_per_minute is None else Bucket(requests_per_minute, clock)
        self._tokens = None if tokens_per_minute is None else Bucket(tokens_per_minute, clock)

    def enter(self) -> tuple[str, int] | None:
        """Count a request in. Returns None, or what has run out and after how many whole seconds to come back; then
        nothing was counted."""
        if self._tokens is not None and (wait_s := self._tokens.wait_s(1.0)) > 0.0:
            return f"{self._tokens.per_minute} tokens per minute", max(1, math.ceil(wait_s))
        if self._requests is not None:
            if (wait_s := self._requests.wait_s(1.0)) > 0.0:
                return f"{self._requests.per_minute} requests per minute", max(1, math.ceil(wait_s))
            self._requests.take(1.0)
        return None

    def charge_tokens(self, num_tokens: int) -> None:
        if self._tokens is not None:
            self._tokens.take(num_tokens)
