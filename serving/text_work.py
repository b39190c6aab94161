"""`TextWork`: what takes longer than a moment (tokenising, reading large bodies) runs beside the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
LONG = 4096  # characters or values: more is worth a thread
LARGE = 2**16  # more needs a place: a thread each for all that come would fill the memory
PLACES = 2


class TextWork:
    """Belongs to one event loop. Large work waits for one of a few places, in the order in which it came."""

    def __init__(self) -> None:
        self._places = asyncio.Semaphore(PLACES)

    async def run(self, size: int, work: Callable[[], T]) -> T:
        """What `work` returns. size: of what it is about, in characters or values."""
        if size <= LONG:
            return work()
        if size <= LARGE:
            return await asyncio.to_thread(work)
        async with self._places:
            return await asyncio.to_thread(work)
