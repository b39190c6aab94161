"""`Connections`: the open connections, how many there may be, and which one is closed when there are too many.

A connection that waits for a head (a silent newcomer, half a head, keep-alive) costs its peer nothing, so it is closed
first, the longest waiting one before others. A few places beyond the limit are kept for health and admin routes, so
that the server's health can be asked while every other place is in use.
"""

from __future__ import annotations

import resource
from collections import Counter
from typing import Protocol

from serving.config import END_REASONS, ConnectionSettings
from xllm.errors import ConfigError

HEAD, BODY, WRITE, FULL = END_REASONS
# Connections that asyncio accepts in one turn; they are counted a turn or two later. Chosen: small, so that the count
# is hardly exceeded.
ACCEPTED_AT_ONCE = 32
KEPT_PLACES = 32  # beyond max_connections, for health and admin routes. Chosen: more than probes and operators need
# Files, pipes and sockets that are no connections (chosen: 128), and connections not yet counted.
OTHER_FILES = 128 + 4 * ACCEPTED_AT_ONCE
# Share of max_connections in use from which a head gets less time. Chosen: slow clients are spared below.
_SHORTENED_FROM = 0.5
# Of head_timeout, when all are in use. Chosen: one second of the default 20 is enough for an honest client.
_SHORTEST = 0.05


class HttpPeer(Protocol):
    """The part of a connection that is used here."""

    def end(self, reason: str) -> None:
        """Close it now; `reason` is one of END_REASONS."""


class Connections:
    """Single-threaded: the event loop's. `closed` counts, by reason, the connections that the server ended."""

    def __init__(self, settings: ConnectionSettings, closed: Counter[str]):
        self.settings, self.closed = settings, closed
        self._open: set[HttpPeer] = set()
        self._headless: dict[HttpPeer, None] = {}  # in the order in which they began to wait
        self._max_open = min(settings.max_connections, allow_files(settings.max_connections))

    @property
    def max_open(self) -> int:
        """max_connections, or fewer where the process may not have so many open files."""
        return self._max_open

    def enter(self, peer: HttpPeer) -> bool:
        """Count a new connection in, perhaps closing another (or this one). Returns False if it got one of the kept
        places."""
        self._open.add(peer)
        self._headless[peer] = None
        if len(self._open) <= self._max_open:
            return True
        oldest = next(iter(self._headless))
        if oldest is not peer or len(self._open) > self._max_open + KEPT_PLACES:
            self._end(oldest)
        return len(self._open) <= self._max_open

    def note_head(self, peer: HttpPeer, waiting: bool) -> None:
        """Note whether a connection waits for a request's head now."""
        if not waiting:
            self._headless.pop(peer, None)
        elif peer in self._open and peer not in self._headless:
            self._headless[peer] = None

    def leave(self, peer: HttpPeer) -> None:
        """Count a closed connection out. May be called twice."""
        self._open.discard(peer)
        self._headless.pop(peer, None)

    def head_timeout_s(self) -> float:
        """How many seconds the next head may take: fewer, the fuller the server is; 0: any time."""
        free = 1 - len(self._open) / self._max_open
        return self.settings.head_timeout * max(_SHORTEST, min(1.0, free / (1 - _SHORTENED_FROM)))

    def _end(self, peer: HttpPeer) -> None:
        self.leave(peer)  # at once, not when the loop comes to it: the next newcomer has this place
        peer.end(FULL)


def allow_files(num_connections: int) -> int:
    """Raise the process's soft limit of open files for so many connections; return how many the hard limit allows.

    Raises ConfigError where it leaves hardly any.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = num_connections + KEPT_PLACES + OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return num_connections
    granted = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    if granted > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (granted, hard))
    allowed = granted - KEPT_PLACES - OTHER_FILES
    if allowed < ACCEPTED_AT_ONCE:
        raise ConfigError(f"the limit of open files is {granted}, too few to serve; raise it (ulimit -n 4096)")
    return allowed
