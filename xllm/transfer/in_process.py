"""`LocalWindow` and `LocalPeer`: a transport within one process, for several engines in it."""

from __future__ import annotations

import queue
import secrets
import threading
import time
import weakref
from collections.abc import Sequence

import numpy as np

from xllm.errors import TransferError
from xllm.transfer.grants import Grants
from xllm.transfer.transport import TransferEvent

PREFIX = "local:"
LOOK_S = 0.2  # between looks at leases, as of a `SocketWindow`
UNKNOWN_S = 5.0  # that a peer may be sooner than the grant it asks for, as of a `SocketWindow`
_WINDOWS: weakref.WeakValueDictionary[str, LocalWindow] = weakref.WeakValueDictionary()


class LocalWindow:
    """A `TransferWindow` that the threads of its own process write into."""

    def __init__(self, num_bytes: int):
        self.memory: np.ndarray = np.zeros(num_bytes, dtype=np.uint8)
        self.addresses: tuple[str, ...] = (PREFIX + secrets.token_hex(8),)
        self._events: queue.SimpleQueue[TransferEvent] = queue.SimpleQueue()
        self.lock = threading.RLock()
        self.grants = Grants(self._events.put, lambda peer, number, reason: None, lambda peer: False)
        _WINDOWS[self.addresses[0]] = self

    def grant(self, number: int, key: bytes, ranges: Sequence[tuple[int, int]], lease_s: float) -> None:
        """See `TransferWindow.grant`."""
        self.grants.add(number, key, ranges, lease_s)

    def take(self, timeout_s: float) -> list[TransferEvent]:
        """See `TransferWindow.take`."""
        events, until_s = list[TransferEvent](), time.monotonic() + timeout_s
        while not events and (left_s := until_s - time.monotonic()) > 0.0:
            self.grants.expire(time.monotonic())
            try:
                events.append(self._events.get(timeout=min(left_s, LOOK_S)))
                while True:
                    events.append(self._events.get_nowait())
            except queue.Empty:
                continue
        return events

    def revoke(self, number: int) -> None:
        """See `TransferWindow.revoke`."""
        self.grants.revoke(number)

    def close(self) -> None:
        """See `TransferWindow.close`."""
        _WINDOWS.pop(self.addresses[0], None)


class LocalPeer:
    """A `TransferPeer` of a `LocalWindow`. Raises TransferError if there is no such window."""

    def __init__(self, address: str):
        self._address, self._identity = address, secrets.token_bytes(8)
        self._asked = set[int]()
        self._window()

    def _window(self) -> LocalWindow:
        if (window := _WINDOWS.get(self._address)) is None:
            raise TransferError("the window is gone")
        return window

    def put(self, number: int, key: bytes, pieces: Sequence[tuple[int, memoryview]], note: bytes) -> None:
        """See `TransferPeer.put`."""
        window = self._window()
        if number not in self._asked:
            self._ask(window, number, key)
        places = [(offset, len(data)) for offset, data in pieces]
        if (refusal := window.grants.begin_put(self._identity, number, places)) is not None:
            raise TransferError(refusal)
        for offset, data in pieces:
            window.memory[offset : offset + len(data)] = np.frombuffer(data, dtype=np.uint8)
        window.grants.end_put(number, note, sum(size for _, size in places), None)

    def _ask(self, window: LocalWindow, number: int, key: bytes) -> None:
        until_s = time.monotonic() + UNKNOWN_S
        while (answer := window.grants.ask(self._identity, number, key)) is None and time.monotonic() < until_s:
            time.sleep(0.01)
        if not isinstance(answer, list):
            raise TransferError(answer or "there is no such grant")
        self._asked.add(number)

    def finish(self, number: int, num_peers: int = 1) -> None:
        """See `TransferPeer.finish`."""
        self._asked.discard(number)
        if reason := self._window().grants.finish(self._identity, number, num_peers):
            raise TransferError(f"the window did not take all of it: {reason}")

    def close(self) -> None:
        """See `TransferPeer.close`."""
        if (window := _WINDOWS.get(self._address)) is not None:
            window.grants.lose(self._identity)
