"""`TextWork`: what takes longer than a moment (tokenising, reading large bodies) runs beside the event loop."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
LONG = 4096  # characters or values: more is worth a thread
LARGE = 2**18  # more is done one after the other: a thread for each that comes would fill the memory
THREADS = 4


class TextWork:
    """Belongs to one event loop. Large work waits its turn, in the order in which it came; what is only long goes past
    it."""

    def __init__(self) -> None:
        self._long = ThreadPoolExecutor(THREADS, thread_name_prefix="text")
        self._large = ThreadPoolExecutor(1, thread_name_prefix="large-text")  # a thread keeps memory of its own

    async def run(self, size: int, work: Callable[[], T]) -> T:
        """What `work` returns. size: of what it is about, in characters or values."""
        if size <= LONG:
            return work()
        threads = self._long if size <= LARGE else self._large
        return await asyncio.get_running_loop().run_in_executor(threads, contextvars.copy_context().run, work)
