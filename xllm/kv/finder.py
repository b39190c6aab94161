"""`Finder`: finds the blocks that continue a prompt's prefix below the device: in host memory, on disk, in a store."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from xllm.kv.block import Hasher, token_bytes
from xllm.kv.kv_source import NO_EXTENSION, Extension
from xllm.kv.prefix_index import STRIDE_BLOCKS, PrefixIndex, PrefixMatch
from xllm.kv.store_tier import StoreTier
from xllm.kv.tier_index import NO_SLOT, TierIndex

_NO_SLOTS = np.zeros(0, dtype=np.int32)


class Finder:
    """Changes nothing. Belongs to the KV manager's thread."""

    def __init__(self, index: PrefixIndex, host: TierIndex, disk: TierIndex | None, store: StoreTier | None):
        self._index, self._host, self._disk, self._store = index, host, disk, store

    @property
    def is_empty(self) -> bool:
        """Whether no tier below the device has a block."""
        return not (len(self._host) or self.can_stage)

    @property
    def can_stage(self) -> bool:
        """Whether disk or the store has blocks."""
        return bool(self._disk) or bool(self._store)

    def extend(self, match: PrefixMatch, token_ids: np.ndarray) -> Extension:
        """See `KVSource.extend`."""
        if self.is_empty:
            return NO_EXTENSION
        width = self._index.block_size * 4
        data = token_bytes(token_ids[:-1])
        hasher, done, last = match.hasher, len(match.block_ids) * width, None
        for stride in (STRIDE_BLOCKS * width, width):  # host memory and disk have whole prefixes
            while done + stride <= len(data):
                ahead = hasher.copy()
                ahead.update(data[done : done + stride])
                digest = ahead.digest()
                if not self.has(digest):
                    break
                hasher, last, done = ahead, digest, done + stride
        known = NO_EXTENSION if last is None else self.paths(last)
        stored = self._stored(hasher, data[done:], width)
        return known if not stored else self._with(stored, known, match)

    def _stored(self, hasher: Hasher, data: memoryview, width: int) -> list[bytes]:
        """The blocks that the store has of the tokens that follow, without a gap."""
        found: list[bytes] = []
        store = self._store
        while store is not None and len(data) >= width:
            hasher = hasher.copy()
            hasher.update(data[:width])
            digest = hasher.digest()
            if not store.has(digest):
                break
            found.append(digest)
            data = data[width:]
        return found

    def _with(self, stored: list[bytes], known: Extension, match: PrefixMatch) -> Extension:
        """`known` and what the store has behind it. A path goes to host memory whole: where the device's part of it is
        neither there nor on disk, the store must have it, too."""
        if known is not NO_EXTENSION:
            return replace(known, stored=tuple(stored))
        resident = [self._index.digest_of(block) for block in match.block_ids.tolist()]
        num = next((i for i, digest in enumerate(resident) if not self.has(digest)), len(resident))
        assert self._store is not None
        if not all(map(self._store.has, resident[num:])):
            return NO_EXTENSION
        known = self.paths(resident[num - 1]) if num else NO_EXTENSION
        return replace(known, stored=(*resident[num:], *stored))

    def has(self, digest: bytes) -> bool:
        """Whether host memory or disk has a block."""
        return self._host.find(digest) != NO_SLOT or (self._disk is not None and self._disk.find(digest) != NO_SLOT)

    def paths(self, last: bytes) -> Extension:
        """The path to a block that host memory or disk has."""
        slot = self._host.find(last)
        if slot != NO_SLOT:
            return Extension(self._host.path(slot), _NO_SLOTS)
        assert self._disk is not None
        disk_path = self._disk.path(self._disk.find(last))
        low, high = 0, len(disk_path) - 1  # host memory has a prefix of the path: how long is it?
        while low < high:
            middle = (low + high) // 2
            if self._host.find(self._disk.digest_of(int(disk_path[middle]))) == NO_SLOT:
                high = middle
            else:
                low = middle + 1
        on_host = self._host.find(self._disk.digest_of(int(disk_path[low - 1]))) if low else NO_SLOT
        return Extension(self._host.path(on_host) if low else _NO_SLOTS, disk_path)
