"""`within`: a time limit that never swallows a cancellation."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def within(timeout_s: float, asked: Coroutine[Any, Any, T]) -> T:
    """What the coroutine returns or raises. If it takes longer it is cancelled; raises asyncio.TimeoutError then.

    Up to Python 3.11 `asyncio.wait_for` returns the result in place of a CancelledError where both come at once, so
    that a task which asks again and again cannot be ended (CPython gh-86296).
    """
    task = asyncio.ensure_future(asked)
    try:
        await asyncio.wait({task}, timeout=timeout_s)
    finally:
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        elif not task.cancelled():
            task.exception()  # has been seen, also if this one is cancelled
    if task.cancelled():
        raise asyncio.TimeoutError
    return task.result()
