"""`KVSubscriber`: follows the KV events of instances, ours and vLLM's, and keeps a `GlobalIndex` by them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time

import zmq
import zmq.asyncio

from xllm.kv.event_wire import END, sequence_number
from xllm.kv_events_keys import secure_bound, secure_connected
from xllm.routing.event_feed import EventFeed, OwnReader, Reader
from xllm.routing.global_index import GlobalIndex

# After so long without a batch the instance is asked whether the last one was lost. Chosen: the index is right within a
# second of anything, for two small messages a second and idle instance.
QUIET_S = 0.5
# For a replay to begin, or to go on. Chosen: after that a request or an answer has been lost.
ANSWER_S = 1.0
MAX_BATCHES = 64  # that are read in one turn of the event loop. Chosen: a few milliseconds
logger = logging.getLogger("xllm.client")


class Instance:
    """One instance that is followed. endpoint: of its PUB socket; bound here if `binds`, for instances that connect.
    replay_endpoint: None: it has none. key: the secret that it shares with its readers."""

    def __init__(self, feed: EventFeed, endpoint: str, replay_endpoint: str | None, *, binds: bool = False,
                 key: bytes | None = None):
        self.feed = feed
        self._endpoint, self._replay_endpoint, self._binds, self._key = endpoint, replay_endpoint, binds, key
        self._asked_s: float | None = None  # when a replay was asked for or went on that has not ended
        self.heard_s = time.monotonic()  # when it last said anything, by `time.monotonic()`

    async def follow(self, context: zmq.asyncio.Context, topic: str) -> None:
        """Follow it until this is cancelled."""
        batches = context.socket(zmq.SUB)
        batches.set_hwm(0)
        batches.subscribe(topic)
        if self._key is not None:
            (secure_bound if self._binds else secure_connected)(batches, self._key)
        (batches.bind if self._binds else batches.connect)(self._endpoint)
        replay = self._open_replay(context)
        try:
            while True:
                if self.feed.is_behind and replay is not None:
                    replay = await self._ask(context, replay)
                poller = zmq.asyncio.Poller()
                for socket in (batches, replay):
                    if socket is not None:
                        poller.register(socket, zmq.POLLIN)
                ready = dict(await poller.poll(int(1000 * QUIET_S)))
                if not ready:
                    self.feed.ask_again()
                if replay is not None and replay in ready:
                    await self._take_replayed(replay)
                if batches in ready:
                    await self._take(batches)
        finally:
            for socket in (batches, replay):
                if socket is not None:
                    socket.close(linger=0)

    def _open_replay(self, context: zmq.asyncio.Context) -> zmq.asyncio.Socket | None:
        if self._replay_endpoint is None:
            return None
        socket = context.socket(zmq.DEALER)
        socket.set_hwm(0)
        if self._key is not None:
            secure_connected(socket, self._key)
        socket.connect(self._replay_endpoint)
        return socket

    async def _ask(self, context: zmq.asyncio.Context, replay: zmq.asyncio.Socket) -> zmq.asyncio.Socket:
        """Ask for a replay, unless one is on its way; returns the socket that it comes from."""
        now = time.monotonic()
        if self._asked_s is not None and now - self._asked_s < ANSWER_S:
            return replay
        if self._asked_s is not None:  # what it still brings would be taken for the answer to this request
            replay.close(linger=0)
            again = self._open_replay(context)
            assert again is not None
            replay = again
        self._asked_s = now
        await replay.send_multipart((b"", self.feed.start.to_bytes(8, "big")))
        return replay

    async def _take(self, batches: zmq.asyncio.Socket) -> None:
        self.heard_s = time.monotonic()
        with contextlib.suppress(zmq.Again):
            for _ in range(MAX_BATCHES):
                frames = await batches.recv_multipart(zmq.NOBLOCK)
                number = sequence_number(frames, 3)
                if number is None:
                    self.feed.num_broken += 1
                    self.feed.ask_again()
                else:
                    self.feed.take(number, frames[2])

    async def _take_replayed(self, replay: zmq.asyncio.Socket) -> None:
        self.heard_s = time.monotonic()
        with contextlib.suppress(zmq.Again):
            for _ in range(MAX_BATCHES):
                frames = await replay.recv_multipart(zmq.NOBLOCK)
                number = sequence_number(frames, 3, 4)  # vLLM 0.33 puts the topic before it
                if number is None:
                    self.feed.num_broken += 1
                elif frames[-2] == END:
                    self._asked_s = None
                    self.feed.end_replay()
                else:
                    if self._asked_s is not None:
                        self._asked_s = self.heard_s
                    self.feed.take_replayed(number, frames[-1])


class KVSubscriber:
    """Follows instances for one index, in the event loop in which it is used."""

    def __init__(self, index: GlobalIndex, topic: str = ""):
        self._index, self._topic = index, topic
        self._context = zmq.asyncio.Context()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._dropped = set[asyncio.Task[None]]()
        self.instances: dict[str, Instance] = {}

    def follow(self, name: str, endpoint: str, replay_endpoint: str | None, *, reader: Reader | None = None,
               binds: bool = False, key: bytes | None = None) -> None:
        """Follow an instance from now on. reader: None: it is one of ours. Raises ValueError if the index has no room
        for one more."""
        assert name not in self.instances
        feed = EventFeed(self._index, name, reader or OwnReader(), can_replay=replay_endpoint is not None)
        instance = self.instances[name] = Instance(feed, endpoint, replay_endpoint, binds=binds, key=key)
        self._tasks[name] = asyncio.create_task(self._run(name, instance), name=f"kv-events-{name}")

    async def _run(self, name: str, instance: Instance) -> None:
        try:
            await instance.follow(self._context, self._topic)
        except Exception:  # a bug of ours, or an endpoint that cannot be: the index must not say what it cannot know
            logger.exception("the KV events of %s are followed no more", name)
            self._index.leave(name)

    def drop(self, name: str) -> asyncio.Task[None] | None:
        """Follow an instance no more, and forget what it has; returns what ends soon. Unknown names are ignored."""
        if (task := self._tasks.pop(name, None)) is not None:
            del self.instances[name]
            task.cancel()
            self._dropped.add(task)
            task.add_done_callback(self._dropped.discard)
            self._index.leave(name)
        return task

    async def leave(self, name: str) -> None:
        """As `drop`, and wait for the end."""
        if (task := self.drop(name)) is not None:
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def close(self) -> None:
        """Leave all instances."""
        for name in list(self._tasks):
            self.drop(name)
        await asyncio.gather(*self._dropped, return_exceptions=True)
        self._context.destroy(linger=0)
