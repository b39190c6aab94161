"""`StoreLink`: the ways to a store. `KeyValueStore` stands above one of them, with leases, watches and its state."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

from serving.cluster.key_value import Changes, Committed, Compare, Granted, Identity, Snapshot, Write


class StoreLink(Protocol):
    """One store: etcd, one in this process, or one in another process of this machine.

    Every method may be cancelled, and raises StoreUnreachableError, or StoreRefusedError, whose message names the store
    and the cause. A link may be used again after either: it connects again by itself.
    """

    @property
    def name(self) -> str:
        """Kind and address, for messages."""

    async def identify(self) -> Identity:
        """Which store answers, and its revision, as a majority of its members has it."""

    async def read(self, prefix: bytes, *, is_prefix: bool) -> Snapshot:
        """The items whose keys begin with `prefix`, or the item of this key alone. Linearizable."""

    async def commit(self, conditions: tuple[Compare, ...], writes: tuple[Write, ...]) -> Committed:
        """Write all, at one revision, if every condition holds. Raises LeaseLostError if there is no such lease."""

    async def grant(self, ttl_s: int) -> Granted:
        """A new lease."""

    async def refresh(self, lease: int) -> float:
        """Let a lease last for its whole time again; returns that, in seconds, or 0 if there is no such lease."""

    async def revoke(self, lease: int) -> None:
        """End a lease and delete its keys; one that is not there is no error."""

    def watch(self, prefix: bytes, revision: int) -> AsyncGenerator[Changes, None]:
        """Changes under the prefix from that revision on, for ever. Raises CompactedError where some are not kept."""

    async def close(self) -> None:
        """Let go of connections. Leases run on until they expire."""
