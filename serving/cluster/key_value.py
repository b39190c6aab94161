"""What the metadata store holds, what may be asked of it and what it answers: plain values.

Keys and values are bytes: some of upstream's keys end in a raw 16-byte hash. A store counts its writes: its revision
grows by one with each commit that changes something, and every item says at which it was created and last changed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MAX_COMMIT_BYTES = 2**20  # of a commit's keys and values. Chosen: within etcd's own default of 1.5 MiB a request
MAX_COMMIT_WRITES = 128  # etcd's own default (--max-txn-ops)


@dataclass(frozen=True, slots=True)
class KeyValue:
    """An item as it stands. lease: the id of the lease that it ends with; 0: none."""

    key: bytes
    value: bytes
    create_revision: int
    mod_revision: int
    lease: int = 0


@dataclass(frozen=True, slots=True)
class KeyChange:
    """What happened to a key at a revision. item: as it was written; None: it was deleted."""

    key: bytes
    revision: int
    item: KeyValue | None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All items under a prefix, in the order of their keys, as they stand at a revision: whatever was known before and
    is not in it is gone."""

    revision: int
    items: tuple[KeyValue, ...]


@dataclass(frozen=True, slots=True)
class Changes:
    """Changes under a prefix, in their order, without a gap up to `revision`; those of one commit are never parted."""

    revision: int
    changes: tuple[KeyChange, ...]


@dataclass(frozen=True, slots=True)
class Compare:
    """A condition of a commit: that a key's `field` equals `expected`. A key that is not there has revisions 0 and no
    value."""

    key: bytes
    field: Literal["create_revision", "mod_revision", "value"]
    expected: int | bytes


@dataclass(frozen=True, slots=True)
class Write:
    """Put a key, or delete it where `value` is None. lease: the id of one that the item ends with; 0: none."""

    key: bytes
    value: bytes | None
    lease: int = 0


@dataclass(frozen=True, slots=True)
class Committed:
    """succeeded: every condition held and all was written, at `revision`; else nothing was."""

    succeeded: bool
    revision: int


@dataclass(frozen=True, slots=True)
class Granted:
    """A new lease: its id, and how long it lasts without being refreshed, which may be longer than asked for."""

    lease: int
    ttl_s: float


@dataclass(frozen=True, slots=True)
class Identity:
    """Which store it is, so that one that was wiped is not taken for the old one, and its revision."""

    name: str
    revision: int


def absent(key: bytes) -> Compare:
    """That there is no such key."""
    return Compare(key, "create_revision", 0)


def created_at(key: bytes, revision: int) -> Compare:
    """That the key is still the one that was created then, whatever was put to it since."""
    return Compare(key, "create_revision", revision)


def unchanged(item: KeyValue) -> Compare:
    """That the item is as it was read."""
    return Compare(item.key, "mod_revision", item.mod_revision)


def check_commit(writes: tuple[Write, ...]) -> None:
    """Raises ValueError for what etcd would refuse: a key twice, an empty key, too many writes or bytes."""
    keys = [write.key for write in writes]
    if len(set(keys)) < len(keys):
        raise ValueError("a commit may write each key once only")
    if not all(keys):
        raise ValueError("a key must not be empty")
    if len(keys) > MAX_COMMIT_WRITES:
        raise ValueError(f"a commit has {len(keys)} writes, and {MAX_COMMIT_WRITES} at most are allowed")
    size = sum(len(write.key) + len(write.value or b"") for write in writes)
    if size > MAX_COMMIT_BYTES:
        raise ValueError(f"a commit has {size} bytes, and {MAX_COMMIT_BYTES} at most are allowed")
