"""What may be asked of the embedded store of another process: each call says what it brings along, what the process
that has the store does for it, and so what its result is.

With a call goes a number, which its answer repeats; the answer is the call's result, or a failure.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from serving.cluster.embedded import EmbeddedStore
from serving.cluster.key_value import Changes, Committed, Compare, Granted, Identity, Snapshot, Write
from serving.cluster.store_errors import (
    CompactedError,
    LeaseLostError,
    StoreError,
    StoreRefusedError,
    StoreUnreachableError,
)
from serving.cluster.within import within
from xllm.client.command_codec import Codec

MAX_WAIT_S = 10.0  # of a `Follow`. Chosen: so long a client that is gone is remembered
R_co = TypeVar("R_co", covariant=True)
_FAILURES = {error.__name__: error for error in (StoreUnreachableError, StoreRefusedError, LeaseLostError,
                                                 CompactedError)}


class StoreCall(Protocol[R_co]):
    """A call whose result is an `R_co`."""

    async def run(self, store: EmbeddedStore) -> R_co:
        """Done by the process that has the store. Raises StoreError."""


@dataclass(frozen=True, slots=True)
class Identify:
    """`StoreLink.identify`."""

    async def run(self, store: EmbeddedStore) -> Identity:
        """See `StoreCall`."""
        return await store.identify()


@dataclass(frozen=True, slots=True)
class Read:
    """`StoreLink.read`."""

    prefix: bytes
    is_prefix: bool

    async def run(self, store: EmbeddedStore) -> Snapshot:
        """See `StoreCall`."""
        return await store.read(self.prefix, is_prefix=self.is_prefix)


@dataclass(frozen=True, slots=True)
class Commit:
    """`StoreLink.commit`. until_s: not to be done later, as after the server was stopped for a while, on the
    `time.monotonic()` clock, which all processes of a machine share."""

    conditions: tuple[Compare, ...]
    writes: tuple[Write, ...]
    until_s: float

    async def run(self, store: EmbeddedStore) -> Committed:
        """See `StoreCall`."""
        if time.monotonic() > self.until_s:
            raise StoreUnreachableError(f"{store.name}: a write came too late and was not done")
        return await store.commit(self.conditions, self.writes)


@dataclass(frozen=True, slots=True)
class Grant:
    """`StoreLink.grant`."""

    ttl_s: int

    async def run(self, store: EmbeddedStore) -> Granted:
        """See `StoreCall`."""
        return await store.grant(self.ttl_s)


@dataclass(frozen=True, slots=True)
class Refresh:
    """`StoreLink.refresh`."""

    lease: int

    async def run(self, store: EmbeddedStore) -> float:
        """See `StoreCall`."""
        return float(await store.refresh(self.lease))


@dataclass(frozen=True, slots=True)
class Revoke:
    """`StoreLink.revoke`."""

    lease: int

    async def run(self, store: EmbeddedStore) -> None:
        """See `StoreCall`."""
        await store.revoke(self.lease)


@dataclass(frozen=True, slots=True)
class Follow:
    """A part of `StoreLink.watch`: changes since a revision, none if none came for so long. identity: of the store that
    the revision is of."""

    prefix: bytes
    revision: int
    wait_s: float
    identity: str

    async def run(self, store: EmbeddedStore) -> Changes:
        """See `StoreCall`; takes up to `wait_s`, or `MAX_WAIT_S`."""
        if (await store.identify()).name != self.identity:
            raise StoreUnreachableError(f"{store.name} is not the one that the watch began with")
        until_s = time.monotonic() + min(self.wait_s, MAX_WAIT_S)
        revision = self.revision
        while True:
            found = store.changes(self.prefix, revision)
            revision = max(revision, found.revision + 1)
            if found.changes or time.monotonic() >= until_s:
                return found
            try:
                await within(until_s - time.monotonic(), store.wait(revision))
            except asyncio.TimeoutError:
                continue


@dataclass(frozen=True, slots=True)
class StoreFailure:
    """In place of a result. kind: the name of a class of `store_errors.py`."""

    kind: str
    message: str

    def error(self) -> StoreError:
        """To be raised where the call was made."""
        return _FAILURES.get(self.kind, StoreUnreachableError)(self.message)


StoreAnswer = Identity | Snapshot | Committed | Granted | float | None | Changes | StoreFailure
CALLS: Codec[StoreCall[Any]] = Codec(0, Identify, Read, Commit, Grant, Refresh, Revoke, Follow)
ANSWERS: Codec[StoreAnswer] = Codec(64, Identity, Snapshot, Committed, Granted, float, type(None), Changes,
                                    StoreFailure)
