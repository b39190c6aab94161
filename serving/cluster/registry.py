"""`Registry`: the instances of a cluster, as a master finds them in the metadata store and is connected to them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from serving.cluster.instance_link import InstanceLink, LinkHooks, LinkSettings, MemberState
from serving.cluster.instance_record import ROLES, BadRecordError, InstanceRecord, named_by, read_record, role_prefix
from serving.cluster.key_value import KeyValue, Snapshot
from serving.cluster.key_value_store import KeyValueStore
from serving.cluster.store_errors import StoreClosedError
from xllm.client.gate_wire import PROTOCOL
from xllm.client.remote import RemoteClient
from xllm.stats import EngineStats

NO_RECORD = "the store has no record of it any more"
logger = logging.getLogger("xllm.cluster")


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """An instance as it is now. reason: for its state, or empty. record: None if it cannot be read. client: None unless
    connected."""

    name: str
    role: str
    state: MemberState
    reason: str = ""
    record: InstanceRecord | None = None
    client: RemoteClient | None = None


class Registry:
    """Make it within the event loop that uses it, `await start()`, and `await close()`.

    on_join(name, client, record): an instance is connected, and takes requests; set the client's callbacks there: what
    it has said before is told then. on_leave(name, reason): its client is dead, its streams have failed; the same name
    may join again, with another client. Both are called within the event loop, in pairs.

    An instance with a living connection stays, whatever becomes of the store: records that are gone do not end it. One
    without either is forgotten. Under one name there is one instance, and of one model one fingerprint: that of those
    that are connected; where none is, that of the oldest. Others are refused until these have gone.
    """

    def __init__(self, store: KeyValueStore, settings: LinkSettings, *,
                 on_join: Callable[[str, RemoteClient, InstanceRecord], None] = lambda name, client, record: None,
                 on_leave: Callable[[str, str], None] = lambda name, reason: None):
        self._store, self._settings = store, settings
        self._links: dict[bytes, InstanceLink] = {}
        self._bad: dict[bytes, str] = {}  # keys whose values are no records, and why
        self._old: set[asyncio.Task[None]] = set()
        self._watches: list[asyncio.Task[None]] = []
        self._hooks = LinkHooks(changed=self._changed, on_join=on_join, on_leave=on_leave)

    async def start(self) -> None:
        """Begin; returns once all that is registered is known, not yet connected; the store has been started, and is
        waited for. Raises StoreRefusedError, StoreClosedError."""
        begun = [asyncio.get_running_loop().create_future() for _ in ROLES]
        self._watches = [asyncio.create_task(self._follow(role, known), name=f"members-{role}")
                         for role, known in zip(ROLES, begun, strict=True)]
        try:
            await asyncio.gather(*begun)
        except BaseException:
            await self.close()
            raise

    async def close(self, reason: str = "the master was shut down") -> None:
        """Leave all instances: what they have open fails, and each is told. Idempotent."""
        for task in self._watches:
            task.cancel()
        for link in list(self._links.values()):
            self._forget(link, reason)
        await asyncio.gather(*self._watches, *self._old, return_exceptions=True)

    def members(self) -> list[Member]:
        """All that are registered or connected, by name."""
        found = [Member(name=link.record.name, role=link.record.role, state=link.state, reason=link.reason,
                        record=link.record, client=link.client) for link in self._links.values()]
        for key, reason in self._bad.items():
            if key not in self._links:
                role, name = named_by(key)
                found.append(Member(name=name, role=role, state=MemberState.REFUSED, reason=reason))
        return sorted(found, key=lambda member: (member.name, member.role))

    def loads(self) -> Mapping[str, EngineStats]:
        """What those that are connected said last of their engines, by name."""
        return {link.record.name: link.client.stats for link in self._links.values() if link.client is not None}

    # --- what the store says

    async def _follow(self, role: str, known: asyncio.Future[None]) -> None:
        prefix = role_prefix(role)
        try:
            async with self._store.watch(prefix) as watch:
                async for event in watch:
                    if isinstance(event, Snapshot):
                        found = {item.key for item in event.items}
                        for key in [key for key in {*self._links, *self._bad}
                                    if key.startswith(prefix) and key not in found]:
                            self._note_gone(key)
                        for item in event.items:
                            self._note(item)
                    else:
                        for change in event.changes:
                            self._note_gone(change.key) if change.item is None else self._note(change.item)
                    self._sort()
                    if not known.done():
                        known.set_result(None)
        except Exception as error:
            if not known.done():
                known.set_exception(error)
            elif not isinstance(error, StoreClosedError):
                logger.exception("members are not watched any more")

    def _note(self, item: KeyValue) -> None:
        link = self._links.get(item.key)
        try:
            record = read_record(item.key, item.value)
        except BadRecordError as error:
            reason = f"its record cannot be read: {error}"
            logger.warning("instance %s is refused: %s", named_by(item.key)[1], reason)
            self._bad[item.key] = reason
            if link is not None:
                self._unregister(link, reason)
            return
        self._bad.pop(item.key, None)
        if link is not None and link.record.incarnation_id == record.incarnation_id:
            link.update(record)
            return
        if link is not None:
            self._forget(link, f"another incarnation has taken its place: {record.incarnation_id}")
        self._links[item.key] = InstanceLink(record, self._settings, self._hooks)

    def _note_gone(self, key: bytes) -> None:
        self._bad.pop(key, None)
        if (link := self._links.get(key)) is not None:
            self._unregister(link, NO_RECORD)

    def _unregister(self, link: InstanceLink, reason: str) -> None:
        link.unregister(reason)
        if link.client is None:
            self._forget(link, reason)

    def _forget(self, link: InstanceLink, reason: str) -> None:
        if self._links.get(link.record.key) is link:
            del self._links[link.record.key]
            link.close(reason)
            ending = asyncio.create_task(link.wait_closed())
            self._old.add(ending)
            ending.add_done_callback(self._old.discard)

    # --- who may be used

    def _changed(self, link: InstanceLink) -> None:
        if link.client is None and not link.is_registered:
            self._forget(link, link.reason)
        self._sort()

    def _sort(self) -> None:
        """Judge those that are not used, the oldest first: who has come or gone may change it."""
        names: dict[str, InstanceLink] = {}  # who is connected under which name
        models: dict[str, InstanceLink] = {}  # whose fingerprint counts for which model
        for link in self._links.values():
            if link.client is not None:
                names[link.record.name] = link
                models.update(dict.fromkeys(link.record.model_names, link))
        for link in sorted(self._links.values(), key=lambda link: link.age):
            if link.client is None:
                link.judge(_objection(link.record, names, models))
                if link.state is MemberState.CONNECTING:  # a younger one waits for how that ends
                    for model in link.record.model_names:
                        models.setdefault(model, link)


def _objection(record: InstanceRecord, names: Mapping[str, InstanceLink],
               models: Mapping[str, InstanceLink]) -> str | None:
    """Why it must not be used; None: it may."""
    if record.protocol != PROTOCOL:
        return f"it speaks protocol {record.protocol}, this speaks {PROTOCOL}"
    if (other := names.get(record.name)) is not None:
        return f"{other.record.key.decode()} is connected under that name"
    for model in record.model_names:
        if (other := models.get(model)) is not None and other.record.fingerprint != record.fingerprint:
            return (f"its model {model!r} has fingerprint {record.fingerprint}, and {other.record.name} serves it with "
                    f"{other.record.fingerprint}")
    return None
