"""`OncePerSecond`: logs errors that come by the thousand once a second, with how many there were."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

# Of a message that tell its kind; what follows names the case. Chosen: longer than the fixed beginnings of messages.
_KIND_CHARS = 60
_MAX_KINDS = 1024  # kinds that are remembered. Chosen: bounds memory; the messages are our own and few


class OncePerSecond(logging.Filter):
    """Lets one record of a kind through a second. Two are of one kind if logger, level, the message's beginning and the
    exception's type are the same."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        super().__init__()
        self._clock = clock
        self._seen: dict[tuple[object, ...], tuple[float, int]] = {}  # kind -> last shown, left out since

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[0] if record.exc_info else None
        kind = (record.name, record.levelno, str(record.msg)[:_KIND_CHARS], error)
        now = self._clock()
        shown_s, num_left_out = self._seen.get(kind, (now - 1.0, 0))
        if now - shown_s < 1.0:
            self._seen[kind] = shown_s, num_left_out + 1
            return False
        if len(self._seen) >= _MAX_KINDS:
            self._seen.clear()
        self._seen[kind] = now, 0
        if num_left_out:
            record.msg = f"{record.msg} (and {num_left_out} more alike)"
        return True


class NotAgain(logging.Filter):
    """A log filter: drops what the HTTP server says about an error that `note_logged` was told of."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and getattr(record.exc_info[1], "was_logged", False))


def note_logged(error: BaseException) -> None:
    """Note that an error is in the log; the web framework raises it once more after it has been answered."""
    error.was_logged = True  # type: ignore[attr-defined]


class AtMost:
    """Limits how much of something is logged: so many lines a second, then one that says how many were left out."""

    def __init__(self, per_second: int, clock: Callable[[], float] = time.monotonic):
        self._per_second, self._clock = per_second, clock
        self._second = self._num_shown = self._num_left_out = 0

    def allow(self) -> bool:
        second = int(self._clock())
        if second != self._second:
            self._second, self._num_shown = second, 0
        if self._num_shown >= self._per_second:
            self._num_left_out += 1
            return False
        self._num_shown += 1
        return True

    def complaint(self) -> str:
        """The text about left-out lines, for the next line."""
        num_left_out, self._num_left_out = self._num_left_out, 0
        return f" (and {num_left_out} more refused, without lines)" if num_left_out else ""


def bound_logs() -> None:
    """Limit the log lines of the event loop and the HTTP server, which strangers can cause by the thousand, and drop
    those that repeat what we have logged ourselves."""
    logging.getLogger("uvicorn.error").addFilter(NotAgain())
    for name in ("asyncio", "uvicorn.error"):
        logging.getLogger(name).addFilter(OncePerSecond())
