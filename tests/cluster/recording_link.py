"""`RecordingLink`: a `StoreLink` that writes down what is asked of another one, when, and what it answers."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Awaitable
from dataclasses import dataclass, field
from typing import TypeVar

from serving.cluster.key_value import Changes, Committed, Compare, Granted, Identity, Snapshot, Write
from serving.cluster.store_errors import LeaseLostError, StoreRefusedError
from serving.cluster.store_link import StoreLink
from tests.cluster.linearizable import NEVER

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Reading:
    prefix: bytes
    is_prefix: bool


@dataclass(frozen=True, slots=True)
class Commit:
    conditions: tuple[Compare, ...]
    writes: tuple[Write, ...]


@dataclass(frozen=True, slots=True)
class Revoke:
    lease: int


@dataclass(frozen=True, slots=True)
class Operation:
    """client: who asked. answer: a Snapshot, a Committed, True for a lease that was revoked; None where none came, and
    then ended_s is NEVER."""

    client: str
    asked: Reading | Commit | Revoke
    answer: Snapshot | Committed | bool | None
    begun_s: float
    ended_s: float


@dataclass(slots=True)
class StoreHistory:
    """What several clients did, by `time.monotonic()`, which all processes of a machine share."""

    operations: list[Operation] = field(default_factory=list)


class RecordingLink:
    """What is refused for certain, such as a commit under a lease that is gone, is not written down: it did nothing."""

    def __init__(self, link: StoreLink, history: StoreHistory, client: str):
        self.link, self._history, self._client = link, history, client

    @property
    def name(self) -> str:
        return self.link.name

    async def _ask(self, asked: Reading | Commit | Revoke, answer: Awaitable[T]) -> T:
        begun_s, found, ended_s = time.monotonic(), None, NEVER
        is_refused = False
        try:
            found = await answer
            ended_s = time.monotonic()
            return found
        except (StoreRefusedError, LeaseLostError):
            is_refused = True
            raise
        finally:
            if not is_refused:
                noted = True if found is None and ended_s != NEVER else found
                self._history.operations.append(
                    Operation(self._client, asked, noted, begun_s, ended_s))  # type: ignore[arg-type]

    async def identify(self) -> Identity:
        return await self.link.identify()

    async def read(self, prefix: bytes, *, is_prefix: bool) -> Snapshot:
        return await self._ask(Reading(prefix, is_prefix), self.link.read(prefix, is_prefix=is_prefix))

    async def commit(self, conditions: tuple[Compare, ...], writes: tuple[Write, ...]) -> Committed:
        return await self._ask(Commit(conditions, writes), self.link.commit(conditions, writes))

    async def grant(self, ttl_s: int) -> Granted:
        return await self.link.grant(ttl_s)

    async def refresh(self, lease: int) -> float:
        return await self.link.refresh(lease)

    async def revoke(self, lease: int) -> None:
        await self._ask(Revoke(lease), self.link.revoke(lease))

    def watch(self, prefix: bytes, revision: int) -> AsyncGenerator[Changes, None]:
        return self.link.watch(prefix, revision)

    async def close(self) -> None:
        await self.link.close()
