"""`History`: when contents were last used, also of those that have left the cache.

Letters: K uses remembered, S sets, W ways.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

WAYS = 16  # of a set. Chosen: more ways forget more nearly by age, fewer compare fewer keys for each block of a path


def content_keys(digests: Sequence[bytes]) -> np.ndarray:
    """The first 8 bytes of each 16-byte digest: uint64, never 0."""
    return np.maximum(np.frombuffer(b"".join(digests), dtype=np.uint64)[::2], 1)


class History:
    """The times of the last K uses of up to about `num_contents` contents. Times are the owner's count, from 1 on.

    A set-associative table: a content lies in one of the 16 ways of the set that its key names, and its place in the
    table is its content id. A new one takes the place of the one in its set that was used longest ago, so the table
    forgets by age, needs neither lists nor pauses for clean-up, and a path costs a few numpy calls.
    An entry takes 8 + 8 K bytes.
    """

    def __init__(self, num_contents: int, num_uses: int):
        num_sets = -(-max(num_contents, 4 * WAYS) // WAYS)
        self.num_contents = num_sets * WAYS
        self._keys_SW = np.zeros((num_sets, WAYS), dtype=np.uint64)
        self._keys = self._keys_SW.reshape(-1)
        self._uses = np.zeros((num_uses, self.num_contents), dtype=np.int64)  # [0]: the last; 0: never
        self._last_SW = self._uses[0].reshape(num_sets, WAYS)

    def touch(self, keys: np.ndarray, now: int) -> tuple[np.ndarray, np.ndarray]:
        """Record that one request uses these contents at time `now`; no repeats. Returns (content ids, those of them
        that were new), int32.

        New contents take over ids of old ones. Fewer ids than keys (from the start) if so many keys fall into one set
        that it cannot hold them, as those of a path much longer than the table do.
        """
        sets = (keys % np.uint64(len(self._keys_SW))).astype(np.int64)
        match_NW = self._keys_SW[sets] == keys[:, None]
        ids = sets * WAYS + match_NW.argmax(axis=1)
        found = self._keys[ids] == keys
        old = ids if found.all() else ids[found]
        for newer, older in zip(self._uses[-2::-1], self._uses[:0:-1]):
            older[old] = newer[old]
        self._uses[0][old] = now
        missing = np.flatnonzero(~found)
        if not len(missing):
            return ids.astype(np.int32), _NONE
        ids[missing] = self._enter(keys[missing], sets[missing], now)
        kept = self._keys[ids] == keys
        if not kept.all():
            ids = ids[: int(kept.argmin())]
            missing = missing[missing < len(ids)]
        return ids.astype(np.int32), ids[missing].astype(np.int32)

    def _enter(self, keys: np.ndarray, sets: np.ndarray, now: int) -> np.ndarray:
        """Ids for new contents. Where several want the same one, one of them gets it and the others choose again."""
        ids = np.zeros(len(keys), dtype=np.int64)
        waiting = np.arange(len(keys))
        while len(waiting):
            chosen = sets[waiting] * WAYS + self._last_SW[sets[waiting]].argmin(axis=1)
            self._keys[chosen] = keys[waiting]
            won = self._keys[chosen] == keys[waiting]
            ids[waiting] = chosen
            self._uses[:, chosen] = 0
            self._uses[0][chosen] = now
            waiting = waiting[~won]
        return ids

    def kth_use(self, ids: np.ndarray) -> np.ndarray:
        """The time of each content's K-th last use: int64, 0 if it has fewer than K remembered uses."""
        return self._uses[-1][ids]


_NONE = np.zeros(0, dtype=np.int32)
