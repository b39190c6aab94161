"""`KVEventLog`: collects what has changed in the KV cache between two reports, for those who route by it."""

from __future__ import annotations

from collections.abc import Sequence


class KVEventLog:
    """An `EventSink` of the device and of the tiers below it, which counts a block as cached while any of them has it.
    It keeps what has become of each block since the last `take`. Belongs to the thread that owns the KV manager."""

    def __init__(self) -> None:
        self._num_places: dict[bytes, int] = {}  # by digest: how many have it
        self._is_cached: dict[bytes, bool] = {}  # of those that changed, as they are now

    def stored(self, digest: bytes, parent: bytes) -> None:
        """See `EventSink.stored`."""
        num_places = self._num_places.get(digest, 0)
        self._num_places[digest] = num_places + 1
        if not num_places:
            self._is_cached[digest] = True

    def removed(self, digests: Sequence[bytes]) -> None:
        """See `EventSink.removed`."""
        for digest in digests:
            if self._num_places[digest] > 1:
                self._num_places[digest] -= 1
            else:
                del self._num_places[digest]
                self._is_cached[digest] = False

    def take(self) -> tuple[bytes, bytes] | None:
        """The digests of blocks that are cached now and of those that are not, among the ones that changed since the
        last call, each set joined to one bytes; None: nothing changed."""
        changed, self._is_cached = self._is_cached, {}
        if not changed:
            return None
        stored = b"".join(digest for digest, is_cached in changed.items() if is_cached)
        removed = b"".join(digest for digest, is_cached in changed.items() if not is_cached)
        return stored, removed
