"""Windows and peers within one process: a put is a copy. What the other transports are measured by."""

from __future__ import annotations

import secrets
import threading
import time
import weakref
from collections.abc import Sequence

from xllm.errors import TransferError
from xllm.kv import failpoints
from xllm.transfer.entering import MAX_WAIT_S
from xllm.transfer.grants import Grants
from xllm.transfer.pieces import as_bytes, copy, lengths

_POLL_S = 0.001  # between two looks for a grant that is to come; chosen

_doors: weakref.WeakValueDictionary[str, InProcessDoor] = weakref.WeakValueDictionary()


class InProcessDoor:
    """Of one window. address: for `InProcessPeer`, in this process alone."""

    def __init__(self, grants: Grants, memory: memoryview):
        self.grants = grants
        self.memory = memory
        self.address = f"memory://{secrets.token_hex(16)}"
        self.is_closed = False
        _doors[self.address] = self

    def open(self, number: int) -> None:
        pass

    def bar(self, number: int) -> bool:
        return True  # the grants count who writes

    def close(self) -> None:
        self.is_closed = True
        _doors.pop(self.address, None)


class InProcessPeer:
    """See `Peer`."""

    def __init__(self, address: str, *, num_senders: int = 1, timeout_s: float = 10.0):
        door = _doors.get(address)
        if door is None:
            raise TransferError(f"no window of this process is {address}")
        self._door = door
        self._num_senders = num_senders
        self._timeout_s = min(timeout_s, MAX_WAIT_S)
        self._lock = threading.Lock()
        self._entered: set[int] = set()
        self._closed = False

    def put(self, number: int, key: bytes, pieces: Sequence[tuple[int, memoryview]], note: bytes) -> None:
        flat = as_bytes(pieces, note)
        with self._lock:
            self._enter(number, key, flat)
            grants = self._door.grants
            if not grants.begin(number, self):
                raise TransferError(f"grant {number} is over")
            try:
                if failpoints.armed is not None:
                    failpoints.hit("transfer.put_begun")
                copy(self._door.memory, flat)
            finally:
                grants.done(number)
            grants.landed(number, self, note, sum(len(data) for _, data in flat))

    def finish(self, number: int) -> None:
        with self._lock:
            self._check_open()
            if number not in self._entered:
                raise TransferError(f"nothing was put into grant {number} from here")
            self._entered.remove(number)
            reason = self._door.grants.finished(number, self)
            if reason:
                raise TransferError(f"grant {number} is over: {reason}")

    def close(self) -> None:
        with self._lock:
            if not self._closed:
                self._closed = True
                self._door.grants.lost(self, "its sender left")

    def _enter(self, number: int, key: bytes, pieces: Sequence[tuple[int, memoryview]]) -> None:
        deadline_s = time.monotonic() + self._timeout_s
        self._check_open()
        while (grant := self._door.grants.enter(number, key, self, self._num_senders)) is None:
            if time.monotonic() > deadline_s:
                raise TransferError(f"grant {number} is not known at the window")
            time.sleep(_POLL_S)
        self._entered.add(number)
        outside = grant.ranges.first_outside(lengths(pieces))
        if outside is not None:
            raise TransferError(f"grant {number} does not allow {outside[1]} bytes at {outside[0]}")

    def _check_open(self) -> None:
        if self._closed or self._door.is_closed:
            raise TransferError("the window or the way to it is closed")
