"""`Ranges`: which bytes of a window's memory a grant allows to write."""

from __future__ import annotations

import bisect
from collections.abc import Iterable


class Ranges:
    """Sorted (offset, length) ranges, those that touch merged."""

    def __init__(self, ranges: Iterable[tuple[int, int]]):
        merged: list[list[int]] = []
        for start, length in sorted(ranges):
            if merged and start <= merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], start + length)
            else:
                merged.append([start, start + length])
        self._starts = [start for start, _ in merged]
        self._ends = [end for _, end in merged]

    def covers(self, offset: int, length: int) -> bool:
        """Whether all of these bytes may be written. Bytes of no length may be anywhere."""
        index = bisect.bisect_right(self._starts, offset) - 1
        return length == 0 or (length > 0 and index >= 0 and offset + length <= self._ends[index])

    def first_outside(self, pieces: Iterable[tuple[int, int]]) -> tuple[int, int] | None:
        """The first (offset, length) that is not covered."""
        return next((piece for piece in pieces if not self.covers(*piece)), None)

    def as_pairs(self) -> list[tuple[int, int]]:
        return [(start, end - start) for start, end in zip(self._starts, self._ends, strict=True)]
