"""`BadWords`: which tokens would complete a bad word, found by how the output ends.

The tokens of a word but its last, read backwards as big-endian bytes, are in sorted order; the longest that the output
ends with is at, or before, the place where the output itself, read backwards, would stand. From each entry a link leads
to the longest other one that it begins with, and so to all shorter matches.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

_TOKEN = np.dtype(">u4")


class BadWords:
    """Words of two tokens or more, as token ids. Immutable: all sequences with these words share it."""

    def __init__(self, words: Sequence[Sequence[int]]):
        found: dict[bytes, list[int]] = {}
        for word in words:
            found.setdefault(_backwards(np.array(word[:-1], dtype=np.int64)), []).append(word[-1])
        self._heads = sorted(found)
        self._lasts = [found[head] for head in self._heads]
        self._shorter = _links(self._heads)
        self._begins = frozenset(word[-2] for word in words)
        self._longest = max(map(len, words), default=1) - 1

    def completed(self, output: np.ndarray) -> list[int]:
        """The last token of each word whose others the output (int32 [T]) ends with."""
        if not len(output) or int(output[-1]) not in self._begins:
            return []
        tail = _backwards(output[-self._longest:])
        index, forbidden = bisect_right(self._heads, tail) - 1, list[int]()
        while index >= 0:
            if tail.startswith(self._heads[index]):
                forbidden += self._lasts[index]
            index = self._shorter[index]
        return forbidden


def _backwards(token_ids: np.ndarray) -> bytes:
    return token_ids[::-1].astype(_TOKEN).tobytes()


def _links(heads: Sequence[bytes]) -> list[int]:
    """Of each entry the longest before it that it begins with; -1: there is none."""
    links: list[int] = []
    for index, head in enumerate(heads):
        link = index - 1
        while link >= 0 and not head.startswith(heads[link]):
            link = links[link]
        links.append(link)
    return links
