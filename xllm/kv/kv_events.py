"""`EventSink`: receives every change in which KV blocks a prefix index can find, of the device or of a tier below it,
for routers and the like.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

NoteTokens = Callable[[bytes, memoryview], None]  # a block's digest, and its own tokens as they are hashed (`block.py`)


class EventSink(Protocol):
    """Called for every change, in order, in the thread that owns the KV manager, which waits meanwhile: an
    implementation only notes the event and sends it from a thread of its own. It must not raise.

    Replaying the events gives exactly the blocks that are findable at each moment. A block's parent is stored before
    it, and removed after it or in the same call.
    """

    def stored(self, digest: bytes, parent: bytes) -> None:
        """Called when the block of this digest (`block.py`) has become findable; its bytes may still be on their way
        from host memory. parent: the digest of the block before it, `ROOT` for the first one of a sequence."""
        ...

    def removed(self, digests: Sequence[bytes]) -> None:
        """Called when these blocks, at least one, have stopped being findable."""
        ...
