"""`VllmReader`: what the events of a vLLM server mean in our keys.

vLLM's hashes say nothing here. The tokens do: a block's digest is computed from those of its whole prefix, which the
server has told block by block. So a block is found only if the server publishes token ids, told its parents before,
and nothing but tokens decides what the block holds (no adapter, no salt, no media).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from xllm.kv.block import Hasher, root_hasher, token_bytes
from xllm.kv.event_wire import AllBlocksCleared, BlockStored, KVEvent, number_of, tier_of
from xllm.routing.event_feed import change_of
from xllm.routing.global_index import TierChange, digest_keys

# Hash states that are kept, so that a block behind one of them is hashed alone: about 0.5 kB each. Chosen: as many as
# sequences may grow at a time.
MAX_STATES = 4096


@dataclass(slots=True)
class _Block:
    key: int
    parent: int | None  # vLLM's hash
    tokens: bytes
    tiers: set[int] = field(default_factory=set)  # where it is


class VllmReader:
    """A `Reader` that knows every block of one vLLM server: about 0.4 kB each. max_blocks: at most so many; what comes
    then is not read."""

    replays_all = False

    def __init__(self, max_blocks: int):
        self._max_blocks = max_blocks
        self._blocks: dict[int, _Block] = {}  # by vLLM's hash
        self._states: OrderedDict[int, Hasher] = OrderedDict()
        self.num_unread = 0

    def clear(self) -> None:
        """See `Reader.clear`."""
        self._blocks.clear()
        self._states.clear()

    def read(self, event: KVEvent) -> Iterable[TierChange]:
        """See `Reader.read`."""
        assert not isinstance(event, AllBlocksCleared)
        tier = tier_of(event.medium)
        if tier is None or event.group_idx not in (None, 0):  # further groups are windows of the same tokens
            self.num_unread += len(event.block_hashes)
            return ()
        keys = self._stored(event, tier) if isinstance(event, BlockStored) else self._removed(event.block_hashes, tier)
        return (change_of(event, tier, np.array(keys, dtype=np.uint64)),)

    def _stored(self, event: BlockStored, tier: int) -> list[int]:
        hashes = [number_of(block) for block in event.block_hashes]
        parent = None if event.parent_block_hash is None else number_of(event.parent_block_hash)
        known = 0  # those of another tier have their tokens there
        while known < len(hashes) and hashes[known] in self._blocks:
            known += 1
        added = self._added(event, hashes, known, parent)
        self.num_unread += len(hashes) - known - added
        found = [self._blocks[block] for block in hashes[: known + added]]
        for block in found:
            block.tiers.add(tier)
        return [block.key for block in found]

    def _added(self, event: BlockStored, hashes: list[int], first: int, parent: int | None) -> int:
        """Compute the digests of the blocks from `first` on; returns of how many."""
        size = event.block_size
        is_plain = event.lora_id is None and event.lora_name is None and not any(event.extra_keys or ())
        if first == len(hashes) or not is_plain or size < 1 or len(event.token_ids) != size * len(hashes):
            return 0
        if not 0 <= min(event.token_ids) <= max(event.token_ids) < 2**31:
            return 0
        parent = hashes[first - 1] if first else parent
        if (state := self._state(parent, size)) is None or len(self._blocks) + len(hashes) > self._max_blocks:
            return 0
        data = token_bytes(np.array(event.token_ids, dtype=np.int32))
        for place in range(first, len(hashes)):
            tokens = bytes(data[4 * size * place : 4 * size * (place + 1)])
            state.update(tokens)
            (key,) = digest_keys(state.digest()).tolist()
            self._blocks[hashes[place]] = _Block(key, parent, tokens)
            parent = hashes[place]
        assert parent is not None
        self._keep(parent, state)
        return len(hashes) - first

    def _state(self, block: int | None, block_size: int) -> Hasher | None:
        """A hash state behind a block, to go on from; None: its prefix is not known."""
        missing: list[bytes] = []
        while block is not None and block not in self._states:
            if (found := self._blocks.get(block)) is None:
                return None
            missing.append(found.tokens)
            block = found.parent
        state = root_hasher(block_size) if block is None else self._states[block].copy()
        for tokens in reversed(missing):
            state.update(tokens)
        return state

    def _keep(self, block: int, state: Hasher) -> None:
        self._states[block] = state
        self._states.move_to_end(block)
        if len(self._states) > MAX_STATES:
            self._states.popitem(last=False)

    def _removed(self, hashes: Iterable[int | bytes], tier: int) -> list[int]:
        keys = []
        for number in map(number_of, hashes):
            if (block := self._blocks.get(number)) is not None:
                keys.append(block.key)
                block.tiers.discard(tier)
                if not block.tiers:
                    del self._blocks[number]
                    self._states.pop(number, None)
        return keys
