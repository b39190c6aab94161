"""`KeyTable`: a hash table of 64-bit keys in numpy arrays, of a fixed size, that looks up many keys at once.

A key may stand in one of two buckets of eight ways; it goes to the emptier one, so that buckets fill evenly (two
choices: Azar et al., 1994). A look-up compares sixteen ways, whatever the table holds: no chains, no tombstones,
nothing is ever moved. Where both buckets are full, the way of the first that was used longest ago is given to the new
key. Letters: N keys.
"""

from __future__ import annotations

import numpy as np

WAYS = 8  # of a bucket: 64 bytes of keys, a cache line
# How many keys a bucket is planned for: 0.625 of its ways. Measured with random keys in room for a million: the first
# one that finds both buckets full comes at 0.72, in room for ten thousand at 0.79.
KEYS_PER_BUCKET = 5
FEW_KEYS = 64  # Chosen: up to there a set of them is made faster than they are sorted
NOWHERE = -1  # the place of a key that is not there
_EMPTY = np.uint64(0)
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


class KeyTable:
    """Room for `num_keys` keys: at least so many, unless they collide on purpose. Keys are uint64 other than 0 and
    evenly spread, as digests are. A place is a number below `num_places` and stays a key's until it is removed."""

    def __init__(self, num_keys: int):
        self._num_buckets = np.uint64(max(2, -(-num_keys // KEYS_PER_BUCKET)))
        self._keys = np.zeros((int(self._num_buckets), WAYS), dtype=np.uint64)
        self.keys = self._keys.reshape(-1)  # by place; 0: none
        self.used = np.zeros(self.num_places, dtype=np.uint32)  # by place: when, by the caller's clock
        self._num_keys = 0

    def __len__(self) -> int:
        return self._num_keys

    @property
    def num_places(self) -> int:
        return self._keys.size

    @property
    def num_bytes(self) -> int:
        """Memory of its arrays."""
        return self._keys.nbytes + self.used.nbytes

    def find(self, keys: np.ndarray) -> np.ndarray:
        """The places of keys, or `NOWHERE`: int64 [N]."""
        both = self._buckets(keys)
        hit = (self._keys[both] == keys[:, None, None]).reshape(len(keys), 2 * WAYS)
        way = hit.argmax(axis=1)
        rows = np.arange(len(keys))
        places = both[rows, way // WAYS] * WAYS + way % WAYS
        return np.where(hit[rows, way], places, NOWHERE)

    def insert(self, keys: np.ndarray, now: int) -> tuple[np.ndarray, np.ndarray]:
        """Give places to keys, none of which is there and none of which is given twice, in the order of the result:
        (places of new keys, those of them from which another key had to go), int64. More keys than fit evict each
        other, so that a place may come twice."""
        taken, evicted = [], []
        while len(keys):
            both = self._buckets(keys)
            is_empty = self._keys[both] == _EMPTY
            num_empty = is_empty.sum(axis=2)
            second = (num_empty[:, 1] > num_empty[:, 0]).astype(np.intp)
            rows = np.arange(len(keys))
            buckets, chosen = _different(both[rows, second], rows)  # one key each at a time
            is_empty = is_empty[chosen, second[chosen]]
            ways = is_empty.argmax(axis=1)
            full = ~is_empty.any(axis=1)
            if full.any():
                ways[full] = self.used.reshape(-1, WAYS)[buckets[full]].argmin(axis=1)
            places = buckets * WAYS + ways
            self.keys[places] = keys[chosen]
            self.used[places] = now
            self._num_keys += len(places) - int(np.count_nonzero(full))
            taken.append(places)
            evicted.append(places[full])
            keys = np.delete(keys, chosen) if len(chosen) < len(keys) else keys[:0]
        return _joined(taken), _joined(evicted)

    def remove(self, places: np.ndarray) -> None:
        """Forget the keys of these places, all of which have one. No repeats."""
        self.keys[places] = _EMPTY
        self._num_keys -= len(places)

    def _buckets(self, keys: np.ndarray) -> np.ndarray:
        """Both buckets of each key: int64 [N, 2]. Each half of a key is taken as a fraction of the buckets."""
        halves = np.empty((len(keys), 2), dtype=np.uint64)
        np.right_shift(keys, _HALF, out=halves[:, 0])
        np.bitwise_and(keys, _LOW, out=halves[:, 1])
        return (halves * self._num_buckets >> _HALF).astype(np.int64)


def _different(buckets: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The buckets without repeats, and of each the first of its rows. Few keys at a time, as an instance reports them,
    mostly have none, and sorting them would cost more than all the rest."""
    if len(rows) <= FEW_KEYS and len(set(buckets.tolist())) == len(rows):
        return buckets, rows
    return np.unique(buckets, return_index=True)


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
