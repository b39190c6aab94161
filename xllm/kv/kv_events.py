"""`EventSink`: hears which KV blocks the device's prefix index can find, so that others may know it too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class EventSink(Protocol):
    """Told of every change, in order, by the thread that owns the KV manager, which waits meanwhile: a sink notes what
    it hears, and sends it in a thread of its own. It must not raise.

    Whoever replays the events knows at every moment exactly which blocks are findable. A block's parent is stored
    before it and removed after it, or in the same call.
    """

    def stored(self, digest: bytes, parent: bytes) -> None:
        """The block of this digest (`block.py`) is findable from now on; its bytes may still be on their way from host
        memory. parent: the digest of the block before it, `ROOT` for the first one of a sequence."""
        ...

    def removed(self, digests: Sequence[bytes]) -> None:
        """These blocks, at least one, are not findable any more."""
        ...
