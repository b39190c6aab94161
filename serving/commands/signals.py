"""`EndSignals`: tells the first signal that ends a process, its echoes and a second one apart."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

# A signal means "at once" only so long after the first one. Supervisors signal the process and then its group, and
# wrappers pass on what the terminal has sent to all already: both come within milliseconds, on a busy machine within
# hundreds of them. A hand that presses Ctrl-C again, because nothing seems to happen, takes longer than half a second.
SECOND_AFTER_S = {signal.SIGTERM: 1.5, signal.SIGINT: 0.5}
FIRST, ECHO, SECOND = "first", "echo", "second"


class EndSignals:
    """Call `note` for every SIGTERM and SIGINT. clock: seconds, for tests."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._first_s: float | None = None

    def note(self, signum: int) -> str:
        """FIRST: end in order. ECHO: the same wish again, to be ignored. SECOND: end at once."""
        now = self._clock()
        if self._first_s is None:
            self._first_s = now
            return FIRST
        return SECOND if now - self._first_s >= SECOND_AFTER_S[signal.Signals(signum)] else ECHO
