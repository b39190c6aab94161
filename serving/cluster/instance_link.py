"""`InstanceLink`: one life of one instance as a master sees it: its record, and the connection to its gate."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from serving.cluster.instance_record import InstanceRecord
from serving.cluster.within import within
from xllm.client.cluster_keys import ClusterKeys
from xllm.client.remote import PROGRESS_S, SILENCE_S, RemoteClient
from xllm.engine.commands import CacheChanges
from xllm.errors import EngineDeadError

# Between tries to connect, the first and the longest pause. Chosen: a lost packet costs little, and an instance that is
# away for long gets a try in time to be back within seconds.
FIRST_RETRY_S, LAST_RETRY_S = 0.2, 5.0
logger = logging.getLogger("xllm.cluster")


class MemberState(enum.Enum):
    """Of an instance. CONNECTING: for the first time. ACTIVE: connected. LEASE_LOST: connected, and used, although the
    store has no record of it any more. SUSPECT: the connection was lost, or could not be made, and is tried again.
    REFUSED: it must not be used, for the reason that is given. DRAINING: connected, and about to end."""

    CONNECTING = "connecting"
    ACTIVE = "active"
    LEASE_LOST = "lease lost"
    SUSPECT = "suspect"
    REFUSED = "refused"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkHooks:
    """What a link tells the registry. changed(link): its state has. on_join, on_leave: see `Registry`."""

    changed: Callable[[InstanceLink], None]
    on_join: Callable[[str, RemoteClient, InstanceRecord], None]
    on_leave: Callable[[str, str], None]


@dataclass(frozen=True, slots=True)
class LinkSettings:
    """name: what logs of instances call this process. See `RemoteClient` for `silence_s`."""

    keys: ClusterKeys
    name: str = "master"
    silence_s: float = SILENCE_S
    first_retry_s: float = FIRST_RETRY_S
    last_retry_s: float = LAST_RETRY_S


class InstanceLink:
    """Connects to the incarnation of its record, and again when the connection is lost, until `close`.

    record: the newest. is_registered: the store has it. client: connected and joined, else None. reason: for its state.
    """

    def __init__(self, record: InstanceRecord, settings: LinkSettings, hooks: LinkHooks):
        self.record, self.is_registered = record, True
        self.client: RemoteClient | None = None
        self.reason = ""
        self._settings, self._hooks = settings, hooks
        self._has_failed = self._is_refused = self._is_wrong = self._is_closed = False
        self._wake = asyncio.Event()
        self._task = asyncio.create_task(self._run(), name=f"instance-{record.name}")

    @property
    def age(self) -> tuple[int, str]:
        """Sorts the oldest first."""
        return self.record.register_ts_ms, self.record.name

    @property
    def state(self) -> MemberState:
        """As it is now."""
        if self.client is not None:
            if self.record.draining or self.client.draining:
                return MemberState.DRAINING
            return MemberState.ACTIVE if self.is_registered else MemberState.LEASE_LOST
        if self._is_refused or self._is_wrong:
            return MemberState.REFUSED
        return MemberState.SUSPECT if self._has_failed else MemberState.CONNECTING

    def update(self, record: InstanceRecord) -> None:
        """The same incarnation's record has come, once more or with other words."""
        if record.rpc_address != self.record.rpc_address:
            self._leave("it has moved to another address")
        if not self.is_registered:
            logger.info("instance %s: its record is back", record.name)
        self.record, self.is_registered = record, True
        if self.client is not None:
            self.reason = ""
        self._wake.set()

    def unregister(self, reason: str) -> None:
        """The store has no record of it any more."""
        self.is_registered = False
        if self.client is not None and not self.record.draining:
            self.reason = reason
            logger.info("instance %s: %s; its connection lives, it is used on", self.record.name, reason)

    def judge(self, objection: str | None) -> None:
        """Whether one that is not connected may be: why not, or None."""
        if objection is not None:
            if not self._is_refused or objection != self.reason:
                logger.warning("instance %s is refused: %s", self.record.name, objection)
            self._is_refused, self.reason = True, objection
        elif self._is_refused:
            self._is_refused, self._has_failed, self.reason = False, False, ""
            self._wake.set()

    def close(self, reason: str) -> None:
        """Let go of it: what it has open fails at once, for that reason."""
        self._is_closed = True  # for where Python 3.11 swallows a cancellation (see `within`)
        self._task.cancel()
        self._leave(reason)

    async def wait_closed(self) -> None:
        """After `close`: until nothing of it runs."""
        await asyncio.gather(self._task, return_exceptions=True)

    # ---

    async def _run(self) -> None:
        retry_s = self._settings.first_retry_s
        while not self._is_closed:
            if self._is_refused:
                await self._news()
                continue
            begun_s = time.monotonic()
            if await self._joins():
                while self.client is not None:
                    await self._news()
                if time.monotonic() - begun_s > self._settings.last_retry_s:  # it was no flicker
                    retry_s = self._settings.first_retry_s
            with contextlib.suppress(asyncio.TimeoutError):
                await within(retry_s, self._news())
            retry_s = min(2 * retry_s, self._settings.last_retry_s)

    async def _news(self) -> None:
        await self._wake.wait()
        self._wake.clear()

    async def _joins(self) -> bool:
        try:
            return await self._connect()
        except Exception:  # a bug of ours, or of who was told
            logger.exception("connecting to instance %s failed", self.record.name)
            self._leave("using it failed here")
            self._wake.clear()  # that is no news: the next try waits
            return False

    async def _connect(self) -> bool:
        """Whether it joined."""
        record, settings = self.record, self._settings
        client = RemoteClient(record.rpc_address, settings.keys, name=settings.name, silence_s=settings.silence_s)
        told: list[CacheChanges] = []  # what comes before anybody listens
        nobody, client.on_cache_changes = client.on_cache_changes, told.append
        try:
            await client.connect(incarnation=record.incarnation_id)
        except EngineDeadError as error:
            self._fail(str(error), is_wrong=client.is_refused)
            return False
        wrong = self._contradiction(client)
        hangs = client.silent_for_s() > PROGRESS_S  # it would be lost at the next beat
        is_over = self._is_refused or self._is_closed or self.record.rpc_address != record.rpc_address
        if wrong is not None or hangs or is_over:
            client.close()
            if wrong is not None or hangs:
                self._fail(wrong or "its engine makes no progress", is_wrong=wrong is not None)
            return False
        self.client, self.reason, self._has_failed, self._is_wrong = client, "", False, False
        client.on_lost = self._lost
        client.on_cache_changes = nobody
        logger.info("instance %s (%s, incarnation %s) has joined", record.name, record.rpc_address,
                    record.incarnation_id)
        self._hooks.on_join(record.name, client, record)
        for changes in told:
            client.on_cache_changes(changes)
        self._hooks.changed(self)
        return True

    def _contradiction(self, client: RemoteClient) -> str | None:
        """What its greeting says otherwise than its record."""
        assert client.model is not None
        for what, greeted, recorded in (("fingerprint", client.model.fingerprint, self.record.fingerprint),
                                        ("names", client.model.names, self.record.model_names)):
            if greeted != recorded:
                return f"its model's {what}: {greeted!r} as it says itself, {recorded!r} in its record"
        return None

    def _fail(self, reason: str, *, is_wrong: bool = False) -> None:
        if reason != self.reason:
            logger.warning("instance %s at %s: %s", self.record.name, self.record.rpc_address, reason)
        self._has_failed, self._is_wrong, self.reason = True, is_wrong, reason
        self._hooks.changed(self)

    def _lost(self, reason: str) -> None:
        self._leave(reason)
        self._wake.set()

    def _leave(self, reason: str) -> None:
        if (client := self.client) is None:
            return
        self.client, self.reason, self._has_failed = None, reason, True
        logger.log(logging.INFO if self.record.draining else logging.WARNING, "instance %s has left: %s",
                   self.record.name, reason)
        client.close(reason)
        self._hooks.on_leave(self.record.name, reason)
        self._hooks.changed(self)
