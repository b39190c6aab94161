"""`FramePort`: a zmq socket that is read by the running event loop, without a task and without a future a message."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import zmq

# Read in one turn of the event loop. Chosen: what else the loop has to do waits for a millisecond or so.
FRAMES_A_TURN = 32
# After a larger message the event loop gets a turn before the next one is read. Chosen: a small one costs less than a
# turn.
LARGE_FRAME_BYTES = 2**15
_READABLE = int(zmq.POLLIN)  # as a plain number: an enum's `&` makes an object


class FramePort:
    """Hands every message of the socket to `take`, which must not raise. Close it; the socket is closed with it."""

    def __init__(self, socket: zmq.Socket[bytes], take: Callable[[list[bytes]], None]):
        self._socket, self._take = socket, take
        self._fd: int = socket.getsockopt(zmq.FD)  # type: ignore[assignment]
        self._loop = asyncio.get_running_loop()
        self._is_due = self.is_closed = False
        self._loop.add_reader(self._fd, self._read)
        self._read_soon()

    def send(self, *parts: bytes) -> None:
        """Send a message. Raises zmq.Again if the other end does not keep up, zmq.ZMQError if it is not there."""
        self._socket.send_multipart(parts, zmq.NOBLOCK)
        self._read_soon()  # the descriptor tells of a message once: sending may have taken that sign

    def read_rest(self) -> None:
        """Hand over now what has come."""
        while not self.is_closed and self._read_one():
            pass

    def close(self, linger_ms: int = 0) -> None:
        """Stop reading, and give what has been sent so long to leave. Idempotent."""
        if not self.is_closed:
            self.is_closed = True
            self._loop.remove_reader(self._fd)
            self._socket.close(linger=linger_ms)

    def _read_soon(self) -> None:
        if not self._is_due:
            self._is_due = True
            self._loop.call_soon(self._read)

    def _read(self) -> None:
        self._is_due = False
        for _ in range(FRAMES_A_TURN):
            if self.is_closed or not (num_bytes := self._read_one()):
                return
            if num_bytes > LARGE_FRAME_BYTES:
                break
        self._read_soon()

    def _read_one(self) -> int:
        """Hand over a message; returns its size and 1, or 0 if there is none."""
        events: int = self._socket.get(zmq.EVENTS)  # type: ignore[assignment]
        if not int(events) & _READABLE:  # reading what is not there would cost an exception
            return 0
        parts = self._socket.recv_multipart(zmq.NOBLOCK)
        self._take(parts)
        return 1 + len(parts[-1])
