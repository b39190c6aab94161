"""`CachedBlocks`: which KV blocks the engines of an instance can find, for clients that come later."""

from __future__ import annotations

from collections.abc import Iterator

from xllm.engine.commands import CacheChanges
from xllm.kv.block import DIGEST_BYTES

DIGESTS_A_SLICE = 2**15  # of a snapshot. Chosen: a frame of a mebibyte or less


class CachedBlocks:
    """A block counts as cached as long as one of the engines has it."""

    def __init__(self, num_engines: int):
        self._cached = [set[bytes]() for _ in range(num_engines)]

    def __len__(self) -> int:
        """Of all engines."""
        return len(set().union(*self._cached))

    def change(self, number: int, changes: CacheChanges) -> CacheChanges:
        """Take in what has changed in one engine; returns what has changed for the instance."""
        removed, stored = _digests(changes.removed), _digests(changes.stored)
        self._cached[number].difference_update(removed)
        self._cached[number].update(stored)
        others = [found for other, found in enumerate(self._cached) if other != number]
        if not others:
            return changes
        return CacheChanges(_joined(digest for digest in stored if not any(digest in found for found in others)),
                            _joined(digest for digest in removed if not any(digest in found for found in others)))

    def forget(self, number: int) -> CacheChanges | None:
        """An engine is gone and its cache with it; returns what has changed for the instance, None: nothing."""
        if not self._cached[number]:
            return None
        changes = self.change(number, CacheChanges(b"", _joined(self._cached[number])))
        return changes if changes.removed else None

    def snapshot(self) -> Iterator[CacheChanges]:
        """All that is cached, as changes of an empty cache."""
        digests = list(set().union(*self._cached))
        for at in range(0, len(digests), DIGESTS_A_SLICE):
            yield CacheChanges(b"".join(digests[at:at + DIGESTS_A_SLICE]), b"")


def _digests(joined: bytes) -> list[bytes]:
    return [joined[at:at + DIGEST_BYTES] for at in range(0, len(joined), DIGEST_BYTES)]


def _joined(digests: Iterator[bytes] | set[bytes]) -> bytes:
    return b"".join(digests)
