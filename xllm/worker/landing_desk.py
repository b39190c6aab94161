"""`LandingDesk`: takes KV blocks that other instances write into this rank's window, and tells when they are whole."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import numpy as np

from xllm.kv.moves import Move, MoveDone, MoveError
from xllm.transfer.transport import Arrived, Window

LOOK_S = 0.5  # how long the thread sleeps at most before it looks whether it is to end. Chosen: an end waits that long
_log = logging.getLogger(__name__)


class _Landing:
    """num_bytes: of each block, how many have come. is_wanted: False: the engine has ended it."""

    __slots__ = ("began_s", "first", "is_wanted", "move", "num_bytes")

    def __init__(self, move: Move):
        self.move, self.first = move, int(move.sources[0])
        self.num_bytes = np.zeros(len(move.targets), dtype=np.int64)
        self.began_s, self.is_wanted = time.monotonic(), True


class LandingDesk:
    """A thread that begins with the first landing. `begin` and `revoke` are called by the thread that receives the
    moves; report is called with each landing that is over, in the desk's own thread.

    block_bytes: of one slot. A landing is over when the window says that no more comes: the blocks before the first gap
    are good then.
    """

    def __init__(self, window: Window, block_bytes: int, report: Callable[[MoveDone], None]):
        self._window, self._block_bytes, self._report = window, block_bytes, report
        self._open: dict[int, _Landing] = {}
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self, move: Move) -> None:
        """Let those who know the move's key write into its slots."""
        with self._lock:
            self._open[move.number] = _Landing(move)
        ranges = _ranges(move.targets, self._block_bytes)
        self._window.grant(move.number, move.key, ranges, move.lease_s)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="xllm-kv-land", daemon=True)
            self._thread.start()

    def revoke(self, number: int) -> None:
        """Let nobody write for this landing any more, and report it as over. One that is over is ignored."""
        with self._lock:
            if (landing := self._open.get(number)) is None:
                return
            landing.is_wanted = False
        self._window.revoke(number)

    def close(self) -> None:
        """End the thread, and then the window. Landings that are open are not told of."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()
        self._window.close()

    def _run(self) -> None:
        while not self._stopping.is_set():
            for event in self._window.take(LOOK_S):
                with self._lock:
                    landing = self._open.get(event.number)
                if landing is None:
                    continue
                if isinstance(event, Arrived):
                    self._count(landing, event.note)
                else:
                    self._end(landing, event.reason)

    def _count(self, landing: _Landing, note: bytes) -> None:
        """Take in a note: int32 pairs of (block of the path, bytes of it that came). One that makes no sense counts for
        nothing: its blocks are misses then."""
        if len(note) % 8:
            return
        pairs = np.frombuffer(note, dtype=np.int32).reshape(-1, 2)
        blocks = pairs[:, 0].astype(np.int64) - landing.first
        if np.all((blocks >= 0) & (blocks < len(landing.num_bytes)) & (pairs[:, 1] > 0)):
            np.add.at(landing.num_bytes, blocks, pairs[:, 1])

    def _end(self, landing: _Landing, reason: str) -> None:
        with self._lock:
            del self._open[landing.move.number]
        whole = landing.num_bytes == self._block_bytes
        num_done = len(whole) if whole.all() else int(whole.argmin())
        error = MoveError("peer", reason) if reason and num_done < len(whole) else None
        if error is not None and landing.is_wanted:
            _log.warning("%d of %d KV blocks came from another instance: %s", num_done, len(whole), reason)
        elapsed_s = time.monotonic() - landing.began_s
        self._report(MoveDone(landing.move.number, num_done, elapsed_s, elapsed_s, error))


def _ranges(slots: np.ndarray, block_bytes: int) -> list[tuple[int, int]]:
    """(offset, length) of these slots, neighbours together."""
    ordered = np.sort(slots)
    parts = np.split(ordered, np.flatnonzero(np.diff(ordered) != 1) + 1)
    return [(int(part[0]) * block_bytes, len(part) * block_bytes) for part in parts]
