"""Finds the longest cached prefix of a prompt: digest -> block, and each block's parent.

It keeps only the tree of cached blocks; `BlockPool` decides which of them may be evicted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from xllm.errors import IntegrityError
from xllm.kv.block import ROOT, Hasher, root_hasher, token_bytes
from xllm.kv.kv_events import EventSink

# How many blocks one look-up skips while everything matches. Chosen: a hit of n blocks takes n / 64 look-ups in strides
# and up to 63 single ones at the end.
STRIDE_BLOCKS = 64
NO_BLOCK = -1  # stands for the parent of a first block, and for a look-up that finds nothing


class PrefixMatch:
    """A hit: the blocks in order, the hash state after the last of them, whether that began with a salt, and `tail`: a
    cached block that covers the rest of the prompt to its very end, or NO_BLOCK."""

    __slots__ = ("block_ids", "hasher", "is_salted", "tail")

    def __init__(self, block_ids: np.ndarray, hasher: Hasher, is_salted: bool):
        self.block_ids = block_ids
        self.hasher = hasher
        self.is_salted = is_salted
        self.tail = NO_BLOCK


class PrefixIndex:
    """The cached blocks as a tree of prefixes. Not thread-safe; owned by the KV manager.

    Eviction only marks: a block's dictionary entry goes when the block gets its next digest, so that
    making room costs no look-up and there are never more entries than blocks.
    """

    def __init__(self, num_blocks: int, block_size: int):
        self.block_size = block_size
        self._block_of: dict[bytes, int] = {}
        self._digest_of: list[bytes | None] = [None] * num_blocks
        self._flags = bytearray(num_blocks)  # 1: cached; the fast way to ask for one block
        self._is_cached = np.frombuffer(self._flags, dtype=bool)  # the same memory, for many
        self._parent_of: list[int] = [NO_BLOCK] * num_blocks
        self._sink: EventSink | None = None  # None: nobody listens, which costs one test for each change

    def listen(self, sink: EventSink) -> None:
        """Report every block that is findable now to `sink`, and from now on every change. One sink at a time."""
        told = np.zeros(len(self._parent_of), dtype=bool)
        for leaf in self.leaves().tolist():
            path = self.path_to(leaf)
            for block in path[~told[path]].tolist():
                sink.stored(self.digest_of(block), self._parent_digest(block))
            told[path] = True
        self._sink = sink

    def _parent_digest(self, block: int) -> bytes:
        parent = self._parent_of[block]
        return ROOT if parent == NO_BLOCK else self.digest_of(parent)

    def __len__(self) -> int:
        return int(np.count_nonzero(self._is_cached))

    def contains(self, block_ids: np.ndarray) -> np.ndarray:
        """Which of the blocks are cached: bool, as long as `block_ids`."""
        return self._is_cached[block_ids]

    def match(self, token_ids: np.ndarray, cache_salt: str) -> PrefixMatch:
        """The longest run of cached full blocks at the start of `token_ids` (int32)."""
        hasher, data = root_hasher(self.block_size, cache_salt), token_bytes(token_ids)
        last, done = NO_BLOCK, 0
        for stride in (STRIDE_BLOCKS, 1):
            width = stride * self.block_size * 4
            while done + width <= len(data):
                ahead = hasher.copy()
                ahead.update(data[done : done + width])
                block = self.find(ahead.digest())
                if block == NO_BLOCK:
                    break
                hasher, last, done = ahead, block, done + width
        return PrefixMatch(self._path(last, done // (self.block_size * 4)), hasher, cache_salt != "")

    def _path(self, last: int, length: int) -> np.ndarray:
        """The blocks from the root to `last`. All resident: a block outlives its children."""
        parent_of, path, block = self._parent_of, [], last
        for _ in range(length):
            path.append(block)
            block = parent_of[block]
        path.reverse()
        return np.array(path, dtype=np.int32)

    def find(self, digest: bytes) -> int:
        """The block with this digest, or NO_BLOCK."""
        block = self._block_of.get(digest, NO_BLOCK)
        return block if block != NO_BLOCK and self._flags[block] else NO_BLOCK

    def insert(self, digest: bytes, block_id: int, parent: int) -> None:
        """Make a full, settled block findable. Its digest must be new and its parent resident."""
        known = self._block_of.get(digest, NO_BLOCK)
        assert known == NO_BLOCK or not self._flags[known], "it is findable already"
        assert not self._flags[block_id]
        old = self._digest_of[block_id]
        if old is not None and self._block_of.get(old) == block_id:
            del self._block_of[old]
        self._block_of[digest] = block_id
        self._digest_of[block_id] = digest
        self._flags[block_id] = 1
        self._parent_of[block_id] = parent
        if self._sink is not None:
            self._sink.stored(digest, self._parent_digest(block_id))

    def insert_many(self, digests: Sequence[bytes], block_ids: np.ndarray, parents: np.ndarray) -> None:
        """`insert` for a chain of blocks, root first."""
        for digest, block, parent in zip(digests, block_ids.tolist(), parents.tolist()):
            self.insert(digest, block, parent)

    def digest_of(self, block_id: int) -> bytes:
        """The digest of a cached block."""
        digest = self._digest_of[block_id]
        assert digest is not None and self._flags[block_id]
        return digest

    def is_cached(self, block_id: int) -> bool:
        return bool(self._flags[block_id])

    def path_to(self, block_id: int) -> np.ndarray:
        """The cached blocks from the root to this one: int32."""
        length, block = 0, block_id
        while block != NO_BLOCK:
            length, block = length + 1, self._parent_of[block]
        return self._path(block_id, length)

    def leaves(self) -> np.ndarray:
        """The cached blocks that are no cached block's parent: int32."""
        cached = np.flatnonzero(self._is_cached)
        parents = np.array([self._parent_of[block] for block in cached.tolist()], dtype=np.int64)
        return np.setdiff1d(cached, parents).astype(np.int32)

    def remove(self, block_ids: np.ndarray) -> None:
        """Make evicted blocks unfindable."""
        digests = None if self._sink is None else [self.digest_of(block) for block in block_ids.tolist()]
        self._is_cached[block_ids] = False
        if self._sink is not None and digests:
            self._sink.removed(digests)

    def check_integrity(self) -> None:
        """Raise IntegrityError if the maps disagree or a cached block's parent is not resident."""
        for block in np.flatnonzero(self._is_cached).tolist():
            digest, parent = self._digest_of[block], self._parent_of[block]
            if digest is None or self._block_of.get(digest) != block:
                raise IntegrityError(f"block {block} is cached but cannot be found")
            if parent != NO_BLOCK and not self._flags[parent]:
                raise IntegrityError(f"block {block} is cached but its parent {parent} is not")
        for digest, block in self._block_of.items():
            if self._digest_of[block] != digest:
                raise IntegrityError(f"block {block} is listed under a digest that is not its own")
