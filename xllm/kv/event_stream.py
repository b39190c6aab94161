"""`KVEventStream`: the numbered batches in which an instance tells what its KV cache has; and how to catch up on them.

The upper half of a sequence number is when the instance was started, in seconds since 1970, the lower half counts
batches: a restarted instance goes on with higher numbers, so whoever followed the last one sees a gap, asks, and is
told what there is now. The first batch says that all is cleared. A replay from a batch that is still kept sends the
batches again; one from any other place gets a snapshot: a single batch, under the newest number, that clears all and
stores what there is. To a reader that knows nothing of it this is a replay as any other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from xllm.kv.block import ROOT, TIERS, TOKEN_DTYPE
from xllm.kv.event_log import CacheEvents
from xllm.kv.event_wire import CLEARED, INCARNATION_SHIFT, Written, encode, number_of, removed, stored

Numbered = tuple[int, bytes]  # a sequence number and the batch's bytes


class KVEventStream:
    """started_s: seconds since 1970. buffer_steps: batches that are kept. encoding: of events, see `event_wire.py`. Not
    thread-safe."""

    def __init__(self, block_size: int, started_s: float, *, buffer_steps: int, data_parallel_rank: int = 0,
                 encoding: str = "array"):
        self._block_size, self._rank, self._encoding = block_size, data_parallel_rank, encoding
        self._next = int(started_s) << INCARNATION_SHIFT
        self._kept: deque[Numbered] = deque(maxlen=buffer_steps)
        self._ts = started_s
        self._parents: tuple[dict[bytes, bytes], ...] = tuple({} for _ in TIERS)  # by digest; parents come first
        self._tokens: dict[bytes, bytes] = {}
        self._has_begun = False

    def publish(self, changes: Sequence[CacheEvents], now_s: float) -> Numbered:
        """The next batch. now_s: seconds since 1970; what a batch says never goes back."""
        self._ts = max(self._ts, now_s)
        events: list[Written] = [] if self._has_begun else [CLEARED]
        self._has_begun = True
        for change in changes:
            if change.removed:
                events.append(removed([number_of(digest) for digest in change.removed], change.tier))
            for digest in change.removed:
                self._parents[change.tier].pop(digest, None)
            self._parents[change.tier].update(change.stored)
            self._tokens.update(change.tokens)
            events += self._stored(change.tier, change.stored)
        self._drop_tokens(changes)
        numbered = self._next, self._encode(events)
        self._next += 1
        self._kept.append(numbered)
        return numbered

    def _drop_tokens(self, changes: Sequence[CacheEvents]) -> None:
        """Of blocks that no tier has any more."""
        for digest in (digest for change in changes for digest in change.removed) if self._tokens else ():
            if not any(digest in parents for parents in self._parents):
                self._tokens.pop(digest, None)

    def replay(self, start: int) -> list[Numbered]:
        """What brings a reader that has everything before batch `start` up to date."""
        if start == self._next or not self._kept:
            return []
        if self._kept[0][0] <= start < self._next:
            return [numbered for numbered in self._kept if numbered[0] >= start]
        events: list[Written] = [CLEARED]
        for tier, parents in enumerate(self._parents):
            events += self._stored(tier, parents)
        return [(self._next - 1, self._encode(events))]

    def _encode(self, events: list[Written]) -> bytes:
        return encode(self._ts, events, self._rank, self._encoding)

    def _stored(self, tier: int, parents: Mapping[bytes, bytes]) -> Iterator[Written]:
        """Blocks that follow each other are one event, if the tokens of all or of none are known."""
        chain: list[bytes] = []
        for digest, parent in parents.items():
            if chain and (parent != chain[-1] or (digest in self._tokens) != (chain[0] in self._tokens)):
                yield self._event(tier, chain, parents[chain[0]])
                chain = []
            chain.append(digest)
        if chain:
            yield self._event(tier, chain, parents[chain[0]])

    def _event(self, tier: int, chain: Sequence[bytes], parent: bytes) -> Written:
        data = b"".join(self._tokens[digest] for digest in chain) if chain[0] in self._tokens else b""
        return stored([number_of(digest) for digest in chain], None if parent == ROOT else number_of(parent),
                      np.frombuffer(data, dtype=TOKEN_DTYPE).tolist(), self._block_size, tier)
