"""`Laying`: copies one layer of KV blocks from the order of one rank into that of another, all blocks at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from xllm.kv_layout import FieldLayout

SharedField = tuple[FieldLayout, FieldLayout, range]
Axis = tuple[int, int, int]  # size, and the bytes from one to the next here and there


class Laying:
    """shared: fields of the layer as they lie here and there, each with the heads of the model that go from here to
    there. p, q: positions of a block here and there. layer_bytes: of the layer there. One thread uses it."""

    def __init__(self, shared: Sequence[SharedField], p: int, q: int, layer_bytes: int):
        self._shared, self._p, self._q, self._layer_bytes = shared, p, q, layer_bytes
        self._runs: dict[tuple[int, int], list[tuple[int, int]]] = {}

    @property
    def is_empty(self) -> bool:
        """Nothing of the layer goes from here to there."""
        return not self._shared

    def lay(self, layer_BX: np.ndarray, first: int) -> np.ndarray:
        """uint8 [blocks there that are touched, layer_bytes]; bytes that do not come from here are anything. layer_BX:
        uint8 [n, bytes of the layer here], the source's blocks first, first + 1, ... of the path."""
        p, q, num_blocks = self._p, self._q, len(layer_BX)
        laid_BX = np.empty((-(-(first + num_blocks) * p // q) - first * p // q, self._layer_bytes), dtype=np.uint8)
        here, there = np.ascontiguousarray(layer_BX).reshape(-1), laid_BX.reshape(-1)
        row, laid_row = layer_BX.shape[1], self._layer_bytes
        if p >= q:
            split = p // q  # blocks there that one here becomes
            for one, other, heads in self._shared:
                _copy(here, there, one, other, heads, q, (0, 0),
                      [(num_blocks, row, split * laid_row), (split, q * one.position_stride, laid_row)])
            return laid_BX
        joined, done, block = q // p, 0, 0  # blocks here that become one there
        while done < num_blocks:
            skipped = (first + done) % joined
            is_whole = not skipped and num_blocks - done >= joined
            outer = (num_blocks - done) // joined if is_whole else 1
            inner = joined if is_whole else min(joined - skipped, num_blocks - done)
            for one, other, heads in self._shared:
                start = done * row, block * laid_row + skipped * p * other.position_stride
                _copy(here, there, one, other, heads, p, start,
                      [(outer, joined * row, laid_row), (inner, row, p * other.position_stride)])
            done, block = done + outer * inner, block + outer
        return laid_BX

    def runs(self, low: int, high: int) -> list[tuple[int, int]]:
        """(start, end) of the bytes of a block's layer there that come from here, where these positions of it do;
        neighbours together."""
        if (low, high) not in self._runs:
            marks = np.zeros(self._layer_bytes + 2, dtype=bool)  # one more at each end
            for _, f, heads in self._shared:
                shape = (len(heads), high - low, f.width, f.item_bytes)
                first = 1 + f.offset + (heads.start - f.first_head) * f.head_stride + low * f.position_stride
                np.ndarray(shape, bool, marks, first, (f.head_stride, f.position_stride, f.number_stride, 1))[:] = True
            edges = np.flatnonzero(marks[1:] != marks[:-1]).tolist()
            self._runs[low, high] = list(zip(edges[::2], edges[1::2], strict=True))
        return self._runs[low, high]


def _copy(here: np.ndarray, there: np.ndarray, one: FieldLayout, other: FieldLayout, heads: range, num_positions: int,
          start: tuple[int, int], blocks: list[Axis]) -> None:
    """Copy these heads of a field. start: where the first block begins in each. blocks: the axes around those of the
    field. What lies alike on both sides is copied as one item."""
    axes = [*blocks, (len(heads), one.head_stride, other.head_stride),
            (num_positions, one.position_stride, other.position_stride),
            (one.width, one.number_stride, other.number_stride)]
    axes = sorted((axis for axis in axes if axis[0] > 1), key=lambda axis: axis[2], reverse=True)
    item_bytes = one.item_bytes
    while axes and axes[-1][1] == axes[-1][2] == item_bytes:
        item_bytes *= axes.pop()[0]
    shape, item = [size for size, _, _ in axes], np.dtype((np.void, item_bytes))
    first, first_there = (begin + f.offset + (heads.start - f.first_head) * f.head_stride
                          for begin, f in zip(start, (one, other), strict=True))
    values = np.ndarray(shape, item, here, first, [step for _, step, _ in axes])
    np.ndarray(shape, item, there, first_there, [step for _, _, step in axes])[...] = values
