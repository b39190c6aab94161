"""An `EventSink` that replays what it hears, and compares it with what the index can find."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from xllm.kv.block import ROOT
from xllm.kv.prefix_index import NO_BLOCK, PrefixIndex


class Replay:
    """`parent_of`: the parent digest of every block that the events say is findable."""

    def __init__(self, index: PrefixIndex):
        self.parent_of: dict[bytes, bytes] = {}
        self.num_stored = self.num_removed = 0
        self._index = index

    def stored(self, digest: bytes, parent: bytes) -> None:
        assert digest not in self.parent_of, "stored twice"
        assert parent == ROOT or parent in self.parent_of, "stored before its parent"
        assert self._index.find(digest) != NO_BLOCK, "told before it is so"
        self.parent_of[digest] = parent
        self.num_stored += 1

    def removed(self, digests: Sequence[bytes]) -> None:
        assert digests and len(set(digests)) == len(digests)
        for digest in digests:
            assert self._index.find(digest) == NO_BLOCK, "told before it is so"
            del self.parent_of[digest]
        gone = set(digests)
        assert not any(parent in gone for parent in self.parent_of.values()), "removed before a child"
        self.num_removed += len(digests)

    def check(self) -> None:
        """The events say exactly what the index can find, by asking for every block."""
        index = self._index
        blocks = np.flatnonzero(index.contains(np.arange(len(index._parent_of)))).tolist()
        parents = {index.digest_of(block): index._parent_of[block] for block in blocks}
        wanted = {digest: ROOT if parent == NO_BLOCK else index.digest_of(parent) for digest, parent in parents.items()}
        assert self.parent_of == wanted, "a replay of the events finds other blocks"
