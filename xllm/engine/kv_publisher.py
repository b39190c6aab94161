"""`KVPublisher`: sends what changes in the KV cache to whoever subscribes, from a thread of its own (vLLM's
`ZmqEventPublisher`: the same sockets, frames and replays)."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time

import zmq

from xllm.errors import ConfigError
from xllm.kv.event_log import CacheEvents
from xllm.kv.event_stream import KVEventStream
from xllm.kv.event_wire import END, message
from xllm.kv_events_keys import secure_bound, secure_connected
from xllm.kv_events_settings import NAME, KVEvents, is_bound

_IDLE_S = 0.05  # between looks for requests of replays while nothing is published. Chosen: it delays one by as much
_LINGER_MS = 1000  # for the last batches to be sent when the engine ends. Chosen: as long as vLLM waits
_REQUEST_FRAMES = 3  # of a replay's request: who asks, an empty one, the number
logger = logging.getLogger("xllm.engine")


class KVPublisher:
    """key: the secret that subscribers must have; None: there is none, and the endpoints are of this machine. Raises
    ConfigError if they cannot be had. `put` belongs to the engine's thread."""

    def __init__(self, settings: KVEvents, key: bytes | None, block_size: int):
        self._settings = settings
        self._stream = KVEventStream(block_size, time.time(), buffer_steps=settings.buffer_steps,
                                   data_parallel_rank=settings.data_parallel_rank,
                                   encoding=settings.event_encoding)
        self._queue: queue.Queue[list[CacheEvents] | None] = queue.Queue(settings.max_queue_size)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._replay: zmq.Socket[bytes] | None = None
        try:
            self._pub = self._open(zmq.PUB, settings.endpoint, key, settings.hwm)
            if settings.replay_endpoint is not None:
                # One reply of all that is kept fits whole; who asks again without reading loses some of it.
                self._replay = self._open(zmq.ROUTER, settings.replay_endpoint, key, settings.buffer_steps + 2)
        except BaseException:
            self._context.destroy(linger=0)
            raise
        self._thread = threading.Thread(target=self._run, name="kv-events", daemon=True)
        self._thread.start()

    def _open(self, kind: int, endpoint: str, key: bytes | None, hwm: int) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        socket.set_hwm(hwm)
        socket.setsockopt(zmq.IPV6, 1)
        binds = kind == zmq.ROUTER or is_bound(endpoint)
        if key is not None:
            (secure_bound if binds else secure_connected)(socket, key)
        try:
            (socket.bind if binds else socket.connect)(endpoint)
        except zmq.ZMQError as error:
            raise ConfigError(f"{NAME}: {endpoint} cannot be {'bound' if binds else 'used'}: {error}") from None
        return socket

    def put(self, changes: list[CacheEvents]) -> None:
        """Publish what has changed. Waits while `max_queue_size` batches wait to be sent."""
        while self._thread.is_alive():
            with contextlib.suppress(queue.Full):
                return self._queue.put(changes, timeout=1.0)

    def close(self) -> None:
        """Send what waits and end. Idempotent."""
        while self._thread.is_alive():
            with contextlib.suppress(queue.Full):
                self._queue.put(None, timeout=0.1)
                break
        self._thread.join()
        self._context.destroy(linger=_LINGER_MS)

    def _run(self) -> None:
        topic = self._settings.topic.encode()
        try:
            while True:
                self._answer()
                try:
                    changes = self._queue.get(timeout=_IDLE_S)
                except queue.Empty:
                    continue
                if changes is None:
                    return
                self._pub.send_multipart(message(topic, *self._stream.publish(changes, time.time())))
        except Exception:  # a bug of ours: the engine goes on
            logger.exception("events of the KV cache are published no more")

    def _answer(self) -> None:
        """Send the replay that somebody has asked for."""
        if self._replay is None or not self._replay.poll(0):
            return
        frames = self._replay.recv_multipart()
        if len(frames) != _REQUEST_FRAMES or len(frames[2]) != len(END):
            logger.debug("a request for a replay has other frames: %s", [len(frame) for frame in frames])
            return
        for number, payload in self._stream.replay(int.from_bytes(frames[2], "big")):
            self._replay.send_multipart((frames[0], *message(b"", number, payload)))
        self._replay.send_multipart((frames[0], b"", END, b""))
