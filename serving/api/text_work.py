"""`TextWork`: runs work on text that takes longer than a moment (tokenising, reading large bodies) beside the event
loop.
"""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
LONG = 4096  # characters or values: more is worth a thread. Chosen: a thread costs about as much as tokenising so many
LARGE = 2**18  # of more, one after the other is done. Chosen: a thread for each that comes would fill the memory
BRIEF_S = 0.02  # that work may take of the event loop. Chosen: a hundred times what common chat templates take
# For which such work is left to threads once some took longer: the first time, and twice as long each time, up to.
# Chosen: a pause of the machine costs a second of threads, and a template that is always slow one hiccup a minute.
FIRST_SLOW_S, SLOW_S = 1.0, 60.0
THREADS = 4  # for long work. Chosen: it is short enough to need no more


class TextWork:
    """Belongs to one event loop. Large work is done one after the other, in the order in which it came; work that is
    only long passes it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._long = ThreadPoolExecutor(THREADS, thread_name_prefix="text")
        self._slow_until_s = self._slow_s = 0.0  # until when, by the clock, and for how long
        self._large = ThreadPoolExecutor(1, thread_name_prefix="large-text")  # a thread keeps memory of its own

    def may_be_brief(self) -> bool:
        """Whether work that is done in BRIEF_S as a rule may be tried without a thread."""
        return self._clock() >= self._slow_until_s

    def note_slow(self) -> None:
        """Such work took longer."""
        self._slow_s = min(SLOW_S, 2 * self._slow_s or FIRST_SLOW_S)
        self._slow_until_s = self._clock() + self._slow_s

    def note_brief(self) -> None:
        """It did not."""
        self._slow_s = 0.0

    async def run(self, size: int, work: Callable[[], T]) -> T:
        """Run `work`, in a thread if it is long, and return its result. size: of what it is about, in characters or
        values."""
        if size <= LONG:
            return work()
        threads = self._long if size <= LARGE else self._large
        return await asyncio.get_running_loop().run_in_executor(threads, contextvars.copy_context().run, work)
