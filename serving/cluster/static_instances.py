"""`StaticInstances`: instances of a cluster that no metadata store tells of: gates, OpenAI servers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from xllm.client.member_client import MemberClient
from xllm.engine.commands import CacheChanges
from xllm.errors import EngineDeadError

# Between tries to connect, the first and the longest pause. Chosen: a lost packet costs little, and an instance that is
# away for long gets a try in time to be back within seconds.
FIRST_RETRY_S, LAST_RETRY_S = 0.2, 5.0
logger = logging.getLogger("xllm.cluster")


@dataclass(slots=True)
class StaticInstance:
    """client: None unless it is connected. reason: why it is not."""

    name: str
    make: Callable[[], MemberClient]
    client: MemberClient | None = None
    address: str = ""
    reason: str = "it is being connected to"


class StaticInstances:
    """Connects to each, and again when it is lost. Make it within the event loop, `start()`, `await close()`.

    makers: what makes a client of each, by its name. on_join(name, client), on_leave(name, reason): called in pairs.
    What an instance has cached is told behind `on_join`, to the client's `on_cache_changes`.
    """

    def __init__(self, makers: Mapping[str, Callable[[], MemberClient]], *,
                 on_join: Callable[[str, MemberClient], None], on_leave: Callable[[str, str], None]):
        self.all = [StaticInstance(name, make) for name, make in makers.items()]
        self._on_join, self._on_leave = on_join, on_leave
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to connect."""
        self._tasks = [asyncio.create_task(self._keep(one), name=f"instance-{one.name}") for one in self.all]

    async def close(self, reason: str = "the master was shut down") -> None:
        """Leave all of them: what they have open fails."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for one in self.all:
            if one.client is not None:
                client = one.client
                client.close(reason)
                await client.closed()

    async def _keep(self, one: StaticInstance) -> None:
        pause_s = FIRST_RETRY_S
        while True:
            lost = await self._connect(one)
            if lost is not None:
                pause_s = FIRST_RETRY_S
                await lost.wait()
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LAST_RETRY_S)

    async def _connect(self, one: StaticInstance) -> asyncio.Event | None:
        """What is set when the connection is lost; None: there is none."""
        client, lost, told = one.make(), asyncio.Event(), list[CacheChanges]()
        one.address = client.address
        nobody, client.on_cache_changes = client.on_cache_changes, told.append
        try:
            await client.connect()
        except EngineDeadError as error:
            if one.reason != str(error):
                logger.warning("instance %s: %s", one.name, error)
            one.reason = str(error)
            return None
        client.on_cache_changes = nobody

        def leave(reason: str) -> None:
            one.client, one.reason = None, reason
            logger.warning("instance %s has left: %s", one.name, reason)
            self._on_leave(one.name, reason)
            lost.set()

        client.on_lost = leave
        one.client, one.reason = client, ""
        logger.info("instance %s has joined (incarnation %s)", one.name, client.incarnation)
        self._on_join(one.name, client)
        for changes in told:
            client.on_cache_changes(changes)
        return lost
