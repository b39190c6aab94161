"""`EtcdLink`: the way to etcd, over the calls of the package `etcd3` (`etcd_rpc.py`) and grpc's asyncio channels."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, Callable
from typing import Any

from serving.cluster.etcd_errors import is_about_token, store_error
from serving.cluster.etcd_rpc import etcd_rpc
from serving.cluster.etcd_settings import EtcdSettings
from serving.cluster.key_value import (
    Changes,
    Committed,
    Compare,
    Granted,
    Identity,
    KeyChange,
    KeyValue,
    Snapshot,
    Write,
    absent,
)
from serving.cluster.key_value_store import KeyValueStore
from serving.cluster.store_errors import CompactedError, StoreClosedError, StoreUnreachableError

IDENTITY_KEY = b"XLLM:STORE:ID"  # tells a store that was wiped from the one before; behind the namespace as all keys
PAGE_ITEMS = 1000  # of a read. Chosen: a page of small items is far below a megabyte
_CALL_S = 10.0  # after which grpc ends a call. Chosen: its caller has given up before
# grpc's channel: reconnect soon, take answers of any size (pages are bounded), speak to etcd itself.
_CHANNEL = (("grpc.initial_reconnect_backoff_ms", 200), ("grpc.min_reconnect_backoff_ms", 200),
            ("grpc.max_reconnect_backoff_ms", 1000), ("grpc.max_receive_message_length", -1),
            ("grpc.enable_http_proxy", 0))
logger = logging.getLogger(__name__)


def open_etcd(settings: EtcdSettings, *, namespace: bytes = b"") -> KeyValueStore:
    """A store in etcd, to be started. Raises ConfigError if the extra is not installed or a file of the settings cannot
    be used."""
    return KeyValueStore(EtcdLink(settings, namespace=namespace), namespace=namespace)


class EtcdLink:
    """A `StoreLink`. Make it within the event loop that uses it.

    It speaks to one member and goes on to the next one when that does not answer. namespace: before `IDENTITY_KEY`,
    which what is under a prefix does not show. Raises ConfigError if the extra is not installed or a file of the
    settings cannot be used.
    """

    def __init__(self, settings: EtcdSettings, *, namespace: bytes = b""):
        self._rpc = etcd_rpc()
        self._settings, self._identity_key = settings, namespace + IDENTITY_KEY
        self._channels = [self._channel(target) for target in settings.targets]
        self._at = 0
        self._token, self._is_closed = "", False
        self._authenticating = asyncio.Lock()
        if settings.exposes_password:
            logger.warning("%s: the password goes over the network in clear text: use https://", self.name)

    @property
    def name(self) -> str:
        """See `StoreLink`."""
        return f"etcd at {self._settings.targets[self._at]}"

    async def identify(self) -> Identity:
        """See `StoreLink`. Of the member that answers first; who asks an empty store first gives it its name."""
        for is_last in (*(False for _ in self._channels[1:]), True):
            try:
                return await self._identify()
            except StoreUnreachableError:
                if is_last:
                    raise
        raise AssertionError("unreachable")

    async def _identify(self) -> Identity:
        for _ in range(2):
            found = await self.read(self._identity_key, is_prefix=False)
            if found.items:
                return Identity(found.items[0].value.decode(errors="replace"), found.revision)
            name = secrets.token_hex(8).encode()
            await self.commit((absent(self._identity_key),), (Write(self._identity_key, name),))
        raise StoreUnreachableError(f"{self.name}: the key {self._identity_key!r} is deleted as it is written")

    async def read(self, prefix: bytes, *, is_prefix: bool) -> Snapshot:
        """See `StoreLink`. In pages of one revision; begun anew if that is compacted meanwhile."""
        while True:
            try:
                return await self._read_pages(prefix, is_prefix)
            except CompactedError:
                continue

    async def _read_pages(self, prefix: bytes, is_prefix: bool) -> Snapshot:
        items: list[KeyValue] = []
        key, end, revision = (prefix or b"\0", _end_of(prefix), 0) if is_prefix else (prefix, b"", 0)
        while True:
            found = await self._call("KVStub", "Range", self._rpc.RangeRequest(
                key=key, range_end=end, limit=PAGE_ITEMS, revision=revision))
            items += [_item(kv) for kv in found.kvs if not is_prefix or kv.key != self._identity_key]
            revision = revision or found.header.revision
            if not found.more:
                return Snapshot(revision, tuple(items))
            key = found.kvs[-1].key + b"\0"

    async def commit(self, conditions: tuple[Compare, ...], writes: tuple[Write, ...]) -> Committed:
        """See `StoreLink`."""
        done = await self._call("KVStub", "Txn", self._rpc.TxnRequest(
            compare=list(map(self._compare, conditions)), success=list(map(self._write, writes))))
        return Committed(done.succeeded, done.header.revision)

    async def grant(self, ttl_s: int) -> Granted:
        """See `StoreLink`. etcd has no lease of less than 1.5 election timeouts: 2 s, as it comes."""
        granted = await self._call("LeaseStub", "LeaseGrant", self._rpc.LeaseGrantRequest(TTL=ttl_s))
        return Granted(granted.ID, granted.TTL)

    async def refresh(self, lease: int) -> float:
        """See `StoreLink`."""
        request = self._rpc.LeaseKeepAliveRequest(ID=lease)
        return float((await self._call("LeaseStub", "LeaseKeepAlive", request, is_stream=True)).TTL)

    async def revoke(self, lease: int) -> None:
        """See `StoreLink`."""
        import grpc

        await self._call("LeaseStub", "LeaseRevoke", self._rpc.LeaseRevokeRequest(ID=lease),
                         harmless=grpc.StatusCode.NOT_FOUND)

    async def watch(self, prefix: bytes, revision: int) -> AsyncGenerator[Changes, None]:
        """See `StoreLink`. It asks for one revision more than it needs: of a compacted one etcd keeps what was put and
        not what was deleted, and says nothing."""
        import grpc

        at, name = self._at, self.name
        if self._is_closed:
            raise StoreClosedError(f"{name}: this end was closed")
        call = self._rpc.WatchStub(self._channels[at]).Watch(metadata=self._metadata())
        try:
            await call.write(self._rpc.WatchRequest(create_request=self._rpc.WatchCreateRequest(
                key=prefix or b"\0", range_end=_end_of(prefix), start_revision=max(1, revision - 1))))
            while (found := await call.read()) is not grpc.aio.EOF:
                if found.compact_revision:
                    raise CompactedError(f"{name}: changes before revision {found.compact_revision} are not kept")
                if found.canceled:
                    self._token = ""  # an old one is a reason; whatever it is, the next call says it
                    raise StoreUnreachableError(f"{name} ended a watch: {found.cancel_reason or 'it gave no reason'}")
                changes = tuple(change for change in map(_change, found.events)
                                if change.revision >= revision and change.key != self._identity_key)
                if changes:
                    yield Changes(changes[-1].revision, changes)
            raise store_error(name, await call.code(), await call.details())
        except grpc.aio.AioRpcError as error:
            self._go_on_from(at)
            raise store_error(name, error.code(), error.details()) from None
        except asyncio.InvalidStateError:  # it ended before it was asked
            self._go_on_from(at)
            raise store_error(name, await call.code(), await call.details()) from None
        finally:
            call.cancel()

    async def close(self) -> None:
        """See `StoreLink`."""
        self._is_closed = True
        for channel in self._channels:
            await channel.close()

    async def _call(self, stub: str, method: str, request: Any, *, is_stream: bool = False,
                    harmless: Any = None) -> Any:
        """One call's answer; of a stream its first. harmless: a status that is no error, answered by None."""
        import grpc

        if self._is_closed:
            raise StoreClosedError(f"{self.name}: this end was closed")
        for is_last in (False, True):
            if self._settings.user is not None and not self._token:
                await self._authenticate()
            at, name, token = self._at, self.name, self._token
            ask = getattr(getattr(self._rpc, stub)(self._channels[at]), method)
            try:
                return await self._answer(ask, request, is_stream)
            except grpc.aio.AioRpcError as error:
                if error.code() is harmless:
                    return None
                if not is_last and token and is_about_token(error.code(), error.details()):
                    self._token = "" if self._token == token else self._token
                    continue
                if isinstance(found := store_error(name, error.code(), error.details()), StoreUnreachableError):
                    self._go_on_from(at)
                raise found from None
            except asyncio.CancelledError:  # its caller waits no longer
                self._go_on_from(at)
                raise
        raise AssertionError("unreachable")

    async def _answer(self, ask: Callable[..., Any], request: Any, is_stream: bool) -> Any:
        import grpc

        if not is_stream:
            return await ask(request, timeout=_CALL_S, metadata=self._metadata())
        call = ask(iter([request]), timeout=_CALL_S, metadata=self._metadata())
        try:
            found = await call.read()
            if found is grpc.aio.EOF:
                raise StoreUnreachableError(f"{self.name}: a call ended without an answer")
            return found
        finally:
            call.cancel()

    async def _authenticate(self) -> None:
        import grpc

        async with self._authenticating:
            if self._token:
                return
            at, name = self._at, self.name
            request = self._rpc.AuthenticateRequest(name=self._settings.user, password=self._settings.password)
            try:
                stub = self._rpc.AuthStub(self._channels[at])
                self._token = (await stub.Authenticate(request, timeout=_CALL_S)).token
            except grpc.aio.AioRpcError as error:
                found = store_error(name, error.code(), error.details(), user=self._settings.user)
                if isinstance(found, StoreUnreachableError):
                    self._go_on_from(at)
                raise found from None

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        return (("token", self._token),) if self._token else ()

    def _go_on_from(self, at: int) -> None:
        """Speak to the next member, unless that was done meanwhile."""
        if self._at == at:
            self._at = (at + 1) % len(self._channels)

    def _channel(self, target: str) -> Any:
        import grpc.aio

        if not self._settings.has_tls:
            return grpc.aio.insecure_channel(target, options=_CHANNEL)
        credentials = grpc.ssl_channel_credentials(*self._settings.pem_files())
        return grpc.aio.secure_channel(target, credentials, options=_CHANNEL)

    def _compare(self, condition: Compare) -> Any:
        rpc = self._rpc
        target = {"create_revision": rpc.Compare.CREATE, "mod_revision": rpc.Compare.MOD, "value": rpc.Compare.VALUE}
        return rpc.Compare(result=rpc.Compare.EQUAL, target=target[condition.field], key=condition.key,
                           **{condition.field: condition.expected})

    def _write(self, write: Write) -> Any:
        rpc = self._rpc
        if write.value is None:
            return rpc.RequestOp(request_delete_range=rpc.DeleteRangeRequest(key=write.key))
        return rpc.RequestOp(request_put=rpc.PutRequest(key=write.key, value=write.value, lease=write.lease))


def _end_of(prefix: bytes) -> bytes:
    """The first key after all that begin with the prefix; etcd takes b"\\0" for the end of all keys."""
    stem = prefix.rstrip(b"\xff")
    return stem[:-1] + bytes([stem[-1] + 1]) if stem else b"\0"


def _item(found: Any) -> KeyValue:
    return KeyValue(found.key, found.value, found.create_revision, found.mod_revision, found.lease)


def _change(event: Any) -> KeyChange:
    return KeyChange(event.kv.key, event.kv.mod_revision, None if event.type else _item(event.kv))


