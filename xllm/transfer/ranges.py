"""`Ranges`: which bytes of a window's memory a grant allows to write."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


class Ranges:
    """Sorted (offset, length) ranges, those that touch merged."""

    def __init__(self, ranges: Iterable[tuple[int, int]]):
        merged: list[list[int]] = []
        for start, length in sorted(ranges):
            if merged and start <= merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], start + length)
            else:
                merged.append([start, start + length])
        self._bounds_R2 = np.array(merged, np.int64).reshape(-1, 2)  # each one's start and end

    def first_outside(self, pieces: Iterable[tuple[int, int]]) -> tuple[int, int] | None:
        """The first (offset, length) that may not be written. Bytes of no length may be anywhere."""
        pieces_P2 = np.array(list(pieces), np.int64).reshape(-1, 2)
        offsets_P, lengths_P = pieces_P2[:, 0], pieces_P2[:, 1]
        index_P = np.searchsorted(self._bounds_R2[:, 0], offsets_P, "right") - 1
        ends_P = self._bounds_R2[index_P, 1] if len(self._bounds_R2) else np.zeros_like(offsets_P)
        is_within_P = (index_P >= 0) & (lengths_P >= 0) & (offsets_P + lengths_P <= ends_P) | (lengths_P == 0)
        outside = np.flatnonzero(~is_within_P)
        return (int(offsets_P[outside[0]]), int(lengths_P[outside[0]])) if len(outside) else None

    def as_pairs(self) -> list[tuple[int, int]]:
        return [(start, end - start) for start, end in self._bounds_R2.tolist()]
