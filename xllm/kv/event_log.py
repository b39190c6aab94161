"""`KVEventLog`: collects the changes of the prefix index between two reports, for those who route by them."""

from __future__ import annotations

from collections.abc import Sequence


class KVEventLog:
    """An `EventSink` that keeps only what became of each block since the last `take`. Belongs to the thread that owns
    the KV manager."""

    def __init__(self) -> None:
        self._is_findable: dict[bytes, bool] = {}  # by digest, as it is now

    def stored(self, digest: bytes, parent: bytes) -> None:
        """See `EventSink.stored`."""
        self._is_findable[digest] = True

    def removed(self, digests: Sequence[bytes]) -> None:
        """See `EventSink.removed`."""
        self._is_findable.update(dict.fromkeys(digests, False))

    def take(self) -> tuple[bytes, bytes] | None:
        """The digests of blocks that are findable now and of those that are not, among the ones that changed since the
        last call, each set joined to one bytes; None: nothing changed."""
        changed, self._is_findable = self._is_findable, {}
        if not changed:
            return None
        stored = b"".join(digest for digest, is_findable in changed.items() if is_findable)
        removed = b"".join(digest for digest, is_findable in changed.items() if not is_findable)
        return stored, removed
