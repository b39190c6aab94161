"""`SharedFollower`: keeps what an engine knows of a shared store up to date, in a thread of its own.

A file server that hangs stops that thread and nothing else: look-ups read memory, and `trouble` tells that what they
find has become old.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable

from xllm.errors import DiskError
from xllm.kv.shared_store import SharedStore

REFRESH_S = 1.0  # between two looks at the store. Chosen: a prompt of two seconds ago is found
# How old the last look may be. Chosen: far longer than a look at a large store takes, and short enough that few
# requests wait for a store that is away.
STALE_S = 10.0
FIRST_S = 5.0  # that a start waits for the first look; chosen: the first request should find what is there


class SharedFollower:
    """The engine's view of a shared store: which blocks of rank 0 are there. Any thread may ask."""

    def __init__(self, store: SharedStore, refresh_s: float = REFRESH_S):
        """store: opened for reading; the follower closes it."""
        self._store, self._refresh_s = store, refresh_s
        self._seen_s = time.monotonic()
        self._error: str | None = None
        self._has_looked, self._stopping = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._follow, name="xllm-kv-store-follow", daemon=True)
        self._thread.start()
        self._has_looked.wait(FIRST_S)

    def _follow(self) -> None:
        while True:
            try:
                self._store.refresh()
                self._error, self._seen_s = None, time.monotonic()
            except DiskError as error:
                self._error = str(error)
            self._has_looked.set()
            if self._stopping.wait(self._refresh_s):
                return

    @property
    def trouble(self) -> str | None:
        """Why what is known may not be so any more; None: it is up to date."""
        if self._error is not None:
            return self._error
        silent_s = time.monotonic() - self._seen_s
        return f"it has not answered for {silent_s:.0f} s" if silent_s > STALE_S else None

    def has(self, digest: bytes) -> bool:
        """Whether rank 0 finds this block, as far as is known."""
        return self._store.has(digest)

    def __len__(self) -> int:
        return len(self._store)

    def note(self, digests: Iterable[bytes]) -> None:
        """Take note of blocks that this engine's workers have added."""
        self._store.note(digests)

    def forget(self, digest: bytes) -> None:
        """Take note that a block was not there, or not good, at some rank."""
        self._store.forget(digest)

    def close(self) -> None:
        """Stop the thread; one that hangs in the file system is left behind."""
        self._stopping.set()
        self._thread.join(timeout=1.0)
        self._store.close()
