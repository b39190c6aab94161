"""`CachedBlocks`: which KV blocks the engines of an instance can find, for clients that come later."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from xllm.engine.commands import CacheChanges
from xllm.kv.block import DIGEST_BYTES, TIERS

DIGESTS_A_SLICE = 2**15  # of a snapshot. Chosen: a frame of a mebibyte or less


class CachedBlocks:
    """A block counts as cached in a tier as long as one of the engines has it there."""

    def __init__(self, num_engines: int):
        self._cached = [[set[bytes]() for _ in TIERS] for _ in range(num_engines)]

    def __len__(self) -> int:
        """Of all engines and tiers, each block once."""
        return len(set[bytes]().union(*(found for tiers in self._cached for found in tiers)))

    def change(self, number: int, changes: CacheChanges) -> CacheChanges:
        """Take in what has changed in one engine; returns what has changed for the instance."""
        removed, stored = _digests(changes.removed), _digests(changes.stored)
        own = self._cached[number][changes.tier]
        own.difference_update(removed)
        own.update(stored)
        others = [tiers[changes.tier] for other, tiers in enumerate(self._cached) if other != number]
        if not others:
            return changes

        def alone(digests: list[bytes]) -> bytes:
            return _joined(digest for digest in digests if not any(digest in found for found in others))

        return CacheChanges(tier=changes.tier, stored=alone(stored), removed=alone(removed))

    def forget(self, number: int) -> list[CacheChanges]:
        """An engine is gone and its cache with it; returns what has changed for the instance."""
        changes = [self.change(number, CacheChanges(tier=tier, stored=b"", removed=_joined(found)))
                   for tier, found in enumerate(self._cached[number]) if found]
        return [each for each in changes if each.removed]

    def snapshot(self) -> Iterator[CacheChanges]:
        """All that is cached, as changes of an empty cache."""
        for tier in range(len(TIERS)):
            digests = list(set[bytes]().union(*(tiers[tier] for tiers in self._cached)))
            for at in range(0, len(digests), DIGESTS_A_SLICE):
                yield CacheChanges(tier=tier, stored=_joined(digests[at:at + DIGESTS_A_SLICE]), removed=b"")


def _digests(joined: bytes) -> list[bytes]:
    return [joined[at:at + DIGEST_BYTES] for at in range(0, len(joined), DIGEST_BYTES)]


def _joined(digests: Iterable[bytes]) -> bytes:
    return b"".join(digests)
