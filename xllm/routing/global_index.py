"""`GlobalIndex`: which KV blocks the instances of a model can find, in which tier; and who has how much of a prompt.

One table for all instances: a block's key is the low half of its digest, and each tier has a word for it with a bit
for each instance. So a prompt is looked up once for all of them, an instance more costs no memory, and an instance
that has gone is left out of every look-up at once, while its bits are cleared bit by bit as the index is used.

The index may know less than there is, never more: where the table is full, the block that was stored or asked for
longest ago goes. A key of another block with the same 64 bits would be taken for it: among 2^20 blocks with a chance of
2^-44 a look-up, and what follows is that a request is sent to an instance that computes it.
Letters: N blocks, I instances, T tiers (`kv/block.py:TIERS`).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from xllm.kv.block import DIGEST_BYTES, TIERS
from xllm.routing.key_table import FEW_KEYS, NOWHERE, KeyTable

MAX_INSTANCES = 64  # the bits of a word
DEFAULT_BLOCKS = 1 << 20  # chosen: 60 MB; 16 million tokens in blocks of 16
# Of the table, cleared of bits of instances that have gone with every change. Chosen: about 30 us each.
SWEEP_PLACES = 4096
_ONE = np.uint64(1)


def digest_keys(joined: bytes) -> np.ndarray:
    """The keys of digests (`kv/block.py`) that are joined to one bytes: uint64 [N], never 0. It is the number that
    `BlockStored` has on the wire."""
    return checked_keys(np.frombuffer(joined, dtype=">u8").reshape(-1, DIGEST_BYTES // 8)[:, -1])


def checked_keys(numbers: np.ndarray) -> np.ndarray:
    """uint64 numbers as keys: 0 stands for no key in the table, and is 1 here."""
    return np.maximum(numbers.astype(np.uint64), _ONE)


def _different(keys: np.ndarray) -> np.ndarray:
    """The keys without repeats, in any order."""
    few = set(keys.tolist()) if len(keys) <= FEW_KEYS else ()
    return keys if len(few) == len(keys) else np.unique(keys)


@dataclass(frozen=True, slots=True)
class TierChange:
    """Blocks that an instance has stored in a tier, after it has removed others there: keys, uint64 [N] each."""

    tier: int
    stored: np.ndarray
    removed: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.uint64))


@dataclass(frozen=True, slots=True)
class Matches:
    """Who has how much of a prompt. names: of the instances; blocks_TI: how many of its blocks, from the first on and
    without a gap, an instance has in the tiers up to this one: int64 [T, I], rising with T."""

    names: tuple[str, ...]
    blocks_TI: np.ndarray

    def saved(self, load_costs: Sequence[float] | np.ndarray) -> np.ndarray:
        """How many blocks' computing each instance is spared: float64 [I]. load_costs: what a block costs to be brought
        to the device from each tier over what it costs to be computed, [T] or [T, I]; where that is more than 1, it is
        computed and nothing is saved."""
        gains = _gains_of(load_costs) if isinstance(load_costs, tuple) else _gains(load_costs)
        in_tier = self.blocks_TI.copy()
        in_tier[1:] -= self.blocks_TI[:-1]
        return np.asarray((in_tier * gains).sum(axis=0))


def _gains(load_costs: Sequence[float] | np.ndarray) -> np.ndarray:
    """What a block saves in each tier: float64 [T, 1] or [T, I]."""
    costs = np.asarray(load_costs, dtype=np.float64)
    return np.minimum(1.0, np.maximum(0.0, 1.0 - costs)).reshape(len(TIERS), -1)


_gains_of = functools.lru_cache(maxsize=4)(_gains)  # a router's costs stay


class GlobalIndex:
    """num_blocks: different blocks that it has room for. clock: seconds; how long ago a block was used is known to the
    second. Not thread-safe."""

    def __init__(self, num_blocks: int = DEFAULT_BLOCKS, clock: Callable[[], float] = time.monotonic):
        self._clock, self._start_s = clock, clock()
        self._table = KeyTable(num_blocks)
        self._owners = np.zeros((len(TIERS), self._table.num_places), dtype=np.uint64)
        self._bit_of: dict[str, int] = {}
        self._stale: dict[int, int] = {}  # bits of what has gone: how many places may still have them
        self._known: tuple[tuple[str, ...], np.ndarray, np.uint64] | None = None  # as `match` needs them
        self._cursor = 0  # the place where the sweep goes on
        self.num_evicted = 0  # blocks that were dropped because the table was full

    def __len__(self) -> int:
        """Different blocks, those of instances that have gone included until they are cleared."""
        return len(self._table)

    @property
    def num_bytes(self) -> int:
        """Memory of its arrays; nothing else grows."""
        return self._table.num_bytes + self._owners.nbytes

    @property
    def names(self) -> tuple[str, ...]:
        """Of the instances that are known."""
        return tuple(self._bit_of)

    @property
    def is_clearing(self) -> bool:
        """Whether bits of instances that have gone are still to be cleared."""
        return bool(self._stale)

    # --- instances

    def forget(self, name: str) -> None:
        """An instance has nothing any more, or is new. Raises ValueError if there would be more than `MAX_INSTANCES`.
        Takes the same time however much it had."""
        bit = self._free_bit(name)
        self.leave(name)
        self._bit_of[name] = bit
        self._known = None

    def leave(self, name: str) -> None:
        """An instance has gone. Unknown names are ignored."""
        if (bit := self._bit_of.pop(name, None)) is not None:
            self._stale[bit] = self._table.num_places
            self._known = None

    def _free_bit(self, name: str) -> int:
        if name not in self._bit_of and len(self._bit_of) == MAX_INSTANCES:
            raise ValueError(f"{name}: an index has at most {MAX_INSTANCES} instances")
        used = {*self._bit_of.values(), *self._stale}
        if len(used) == MAX_INSTANCES:  # all at once, rather than bit by bit
            if name in self._bit_of:
                self._stale[self._bit_of.pop(name)] = self._table.num_places
            while self._stale:
                self._sweep(self._table.num_places)
            used = set(self._bit_of.values())
        return next(bit for bit in range(MAX_INSTANCES) if bit not in used)

    def _sweep(self, num_places: int) -> None:
        """Clear bits of what has gone, in the next places of the table."""
        first, last = self._cursor, min(self._cursor + num_places, self._table.num_places)
        owners = self._owners[:, first:last]
        owners &= ~_word(self._stale)
        bare = np.flatnonzero((self._table.keys[first:last] != 0) & ~owners.any(axis=0))
        self._table.remove(bare + first)
        self._stale = {bit: left - (last - first) for bit, left in self._stale.items() if left > last - first}
        self._cursor = last % self._table.num_places

    # --- blocks

    def change(self, name: str, changes: Iterable[TierChange]) -> None:
        """Take in what an instance has removed and stored, in this order. Raises KeyError if it is not known."""
        bit = _ONE << np.uint64(self._bit_of[name])
        now = int(self._clock() - self._start_s)
        for change in changes:
            if len(change.removed):
                self._remove(change.tier, bit, change.removed)
            if len(change.stored):
                self._store(change.tier, bit, change.stored, now)
        if self._stale:
            self._sweep(SWEEP_PLACES)

    def _store(self, tier: int, bit: np.uint64, keys: np.ndarray, now: int) -> None:
        places = self._table.find(keys)
        is_new = places == NOWHERE
        if is_new.any():
            known, new = places[~is_new], _different(keys[is_new])
            added, evicted = self._table.insert(new, now)
            self.num_evicted += len(evicted)
            self._owners[:, added] = 0
            places = np.concatenate((known, added))
        self._owners[tier, places] |= bit
        self._table.used[places] = now

    def _remove(self, tier: int, bit: np.uint64, keys: np.ndarray) -> None:
        places = self._table.find(keys)
        places = np.unique(places[places != NOWHERE])
        self._owners[tier, places] &= ~bit
        self._table.remove(places[~self._owners[:, places].any(axis=0)])

    def match(self, keys: np.ndarray) -> Matches:
        """Who has how many of a prompt's blocks, given by their keys from the first on; or of any of them in that
        order, such as `prompt_marks`. They count as used."""
        if self._known is None:
            bits = np.array(list(self._bit_of.values()), dtype=np.intp)
            self._known = tuple(self._bit_of), bits, _word(bits.tolist())
        names, bits, every = self._known
        if not names or not len(keys):
            return Matches(names, np.zeros((len(TIERS), len(names)), dtype=np.int64))
        places = self._table.find(keys)
        missing = (places == NOWHERE).nonzero()[0]
        places = places[: missing[0]] if len(missing) else places
        if not len(places):
            return Matches(names, np.zeros((len(TIERS), len(names)), dtype=np.int64))
        self._table.used[places] = int(self._clock() - self._start_s)
        owners = np.bitwise_or.accumulate(self._owners[:, places] & every, axis=0)
        return Matches(names, _runs(np.bitwise_and.accumulate(owners, axis=1))[:, bits])

    def has(self, name: str, tier: int, keys: np.ndarray) -> np.ndarray:
        """Which blocks an instance has in a tier: bool [N]. For audits."""
        places = self._table.find(keys)
        owned = self._owners[tier, places] >> np.uint64(self._bit_of[name]) & _ONE
        return (places != NOWHERE) & (owned == _ONE)

    def keys_of(self, name: str, tier: int) -> np.ndarray:
        """The keys of all blocks that an instance has in a tier, in no order: uint64 [N]. Looks at the whole table."""
        owned = self._owners[tier] >> np.uint64(self._bit_of[name]) & _ONE == _ONE
        return self._table.keys[owned & (self._table.keys != 0)]

    def num_blocks_of(self, name: str) -> int:
        """How many blocks an instance has, in whichever tier; 0 if it is not known. Looks at the whole table."""
        if name not in self._bit_of:
            return 0
        owned = np.bitwise_or.reduce(self._owners, axis=0) >> np.uint64(self._bit_of[name]) & _ONE == _ONE
        return int(np.count_nonzero(owned & (self._table.keys != 0)))


def _word(bits: Iterable[int]) -> np.uint64:
    return np.uint64(sum(1 << bit for bit in bits))


def _runs(words_TN: np.ndarray) -> np.ndarray:
    """For each tier and each of the 64 bits, how many words have it: int64 [T, 64]. words_TN: uint64 of which each has
    only bits of the one before it in its tier, so that few differ; N at least 1."""
    is_last = np.ones(words_TN.shape, dtype=np.bool_)  # of several equal ones
    np.not_equal(words_TN[:, 1:], words_TN[:, :-1], out=is_last[:, :-1])
    tiers, places = is_last.nonzero()
    bits = np.unpackbits(words_TN[tiers, places].astype("<u8").view(np.uint8).reshape(-1, 8), axis=1,
                         bitorder="little")
    lengths = places + 1
    lengths[1:] -= np.where(tiers[1:] == tiers[:-1], places[:-1] + 1, 0)
    of_tier = np.zeros((len(words_TN), len(lengths)))  # a row a tier, so that one product counts all
    of_tier[tiers, np.arange(len(lengths))] = lengths
    return np.asarray(of_tier @ bits).astype(np.int64)
