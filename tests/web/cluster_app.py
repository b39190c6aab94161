"""A master's HTTP API in a thread of this process, over two engines behind gates of their own."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

import uvicorn

from serving.api.app import create_app
from serving.api.cluster_view import ClusterView, MemberRow
from serving.api.state import ServerState
from serving.config import ServerConfig
from serving.security.keys import KeyRing
from tests.llm.gated import WatchedLocal
from tests.llm.test_clients import read
from tests.llm.test_cluster_client import CONFIG, Cluster, make_request
from tests.llm.test_remote import until
from xllm.client.cluster import ClusterClient
from xllm.engine.commands import CacheChanges
from xllm.engine.core import EngineCore
from xllm.kv.event_log import CacheEvents

NAMES = ("alpha", "beta")
A = TypeVar("A")


class ClusterApp:
    """Use it in a `with` statement; `url` is where it listens."""

    def __enter__(self) -> ClusterApp:
        self._engines = [_engine() for _ in NAMES]
        self._loop, self._is_up = asyncio.new_event_loop(), threading.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),), daemon=True)
        self._thread.start()
        assert self._is_up.wait(30)
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.should_exit = True
        self._thread.join(20)
        for engine in self._engines:
            engine.shutdown()

    def ask(self, name: str, prompt: tuple[int, ...]) -> None:
        """Have a call answered, and its instance's cache known."""
        async def answer() -> None:
            client = self._cluster.client
            stream = client.submit([make_request(name, prompt=prompt)])
            place = self._cluster.having(stream).name
            await read(stream)
            await until(lambda: client.num_cached_blocks(place) > 0)

        self._do(answer())

    def kill_one(self, why: str) -> str:
        """The instance that gets a call, while it answers it. Returns its name."""
        async def hit() -> str:
            stream = self._cluster.client.submit([make_request("hit", prompt=(1, 2, 3))])
            site = self._cluster.having(stream)
            reading = asyncio.create_task(read(stream))
            await asyncio.sleep(0)
            site.kill(why)
            await reading
            return site.name

        return self._do(hit())

    def _do(self, work: Coroutine[Any, Any, A]) -> A:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    async def _serve(self) -> None:
        async with contextlib.AsyncExitStack() as stack:
            self._cluster = Cluster(ClusterClient())
            for name, engine in zip(NAMES, self._engines, strict=True):
                await self._cluster.add(name, engine, stack)
            state = ServerState(self._cluster.client, ServerConfig(), keys=KeyRing())
            state.cluster = ClusterView(engine=self._cluster.client, engines=lambda: [self._cluster.client],
                                        policy="CAR", members=self._rows,
                                        address="127.0.0.1:8889", store=lambda: "the store: up", leader=_no_leader)
            state.loaded = True
            self._server = uvicorn.Server(uvicorn.Config(create_app(state), port=0, lifespan="off", log_config=None))
            serving = asyncio.create_task(self._server.serve())
            while not self._server.started:
                await asyncio.sleep(0.01)
            port = self._server.servers[0].sockets[0].getsockname()[1]
            self.url = f"http://127.0.0.1:{port}"
            self._is_up.set()
            await serving
            await self._cluster.client.close()

    def _rows(self) -> list[MemberRow]:
        return [MemberRow(name=name, role="DEFAULT", address=site.client.gate.address,
                          state="active" if site.client.dead_reason is None else "suspect",
                          reason=site.client.dead_reason or "",
                          client=site.client if site.client.dead_reason is None else None)
                for name, site in self._cluster.sites.items()]


def _engine() -> WatchedLocal:
    """It reports what is cached, as an engine of `xllm serve` does."""
    core = EngineCore(CONFIG)
    engine = WatchedLocal(core)

    def report(changes: list[CacheEvents]) -> None:
        for change in changes:
            engine._report(CacheChanges(change.tier, b"".join(change.stored), b"".join(change.removed)))

    core.cache_watch.listen(report)
    return engine


async def _no_leader() -> None:
    return None
