"""`Relay`: puts the bytes of one rank's KV blocks into the order in which a rank of another instance stores them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from xllm.errors import TransferError
from xllm.kv_layout import FieldLayout, KVLayout


@dataclass(frozen=True, slots=True)
class LaidPiece:
    """data belongs at `offset` of the target's stored block number `block` of the path."""

    block: int
    offset: int
    data: memoryview


class Relay:
    """From rank `source` to rank `target`, which hold the same model. Its methods change nothing.

    shares: whether anything goes from here to there: of ranks that hold the same heads the first one sends. num_peers:
    how many source ranks send to that target. source: in the number format of the target.

    Raises TransferError, naming what does not fit.
    """

    def __init__(self, source: KVLayout, target: KVLayout):
        self._source, self._target = source, target
        _check(source, target)
        self._layers = list(zip(_layers(source), _layers(target), strict=True))
        starts = np.cumsum([0, *(layer_bytes for _, (layer_bytes, _) in self._layers)]).tolist()
        self._starts, self.block_bytes = starts[:-1], starts[-1]
        self._is_same = source.block_size == target.block_size and all(
            mine == theirs for (_, mine), (_, theirs) in self._layers)
        first = self._layers[0][0][1][0], self._layers[0][1][1][0]
        self.shares = _sends(source, first[0]) and bool(_overlap(*first))
        self.num_peers = sum(1 for low in _firsts(source, first[0])
                             if low < first[1].first_head + first[1].num_heads
                             and low + first[0].num_heads > first[1].first_head)

    def pieces(self, layer: int, first: int, layer_BX: np.ndarray) -> list[LaidPiece]:
        """layer_BX: uint8 [n, bytes of the source's layer] in the target's number format: blocks first, first + 1, ...
        of the path, of the source's size."""
        (_, mine), (layer_bytes, theirs) = self._layers[layer]
        start = self._starts[layer]
        if self._is_same:
            return [LaidPiece(first + i, start, _bytes(layer_BX[i])) for i in range(len(layer_BX))]
        p, q = self._source.block_size, self._target.block_size
        first_block, end_block = first * p // q, -(-(first + len(layer_BX)) * p // q)
        laid_BX = np.zeros((end_block - first_block, layer_bytes), dtype=np.uint8)
        filled_BX = np.zeros(laid_BX.shape, dtype=bool)
        for one, other in zip(mine, theirs, strict=True):
            if heads := _overlap(one, other):
                values = _view(layer_BX, one, p, one.item_bytes)[:, heads[0]]
                _place(_view(laid_BX, other, q, one.item_bytes)[:, heads[1]], values, first * p, first_block * q)
                _place(_view(filled_BX, other, q, other.item_bytes)[:, heads[1]],
                       np.broadcast_to(True, values.shape), first * p, first_block * q)
        return [LaidPiece(first_block + i, start + low, _bytes(laid_BX[i, low:high]))
                for i, marks in enumerate(filled_BX) for low, high in _runs(marks)]


def _check(source: KVLayout, target: KVLayout) -> None:
    if source.format != target.format:
        raise TransferError(f"KV is stored there as {target.format}, and is sent as {source.format}")
    if source.block_size % target.block_size and target.block_size % source.block_size:
        raise TransferError(f"KV blocks of {source.block_size} tokens here and {target.block_size} there do not divide")
    mine, theirs = list(_layers(source)), list(_layers(target))
    if len(mine) != len(theirs):
        raise TransferError(f"the model has {len(mine)} layers here and {len(theirs)} there")
    for layer, ((_, ours), (_, others)) in enumerate(zip(mine, theirs)):
        same = len(ours) == len(others) and all(
            (a.width, a.total_heads, a.item_bytes) == (b.width, b.total_heads, b.item_bytes)
            for a, b in zip(ours, others))
        if not same:
            raise TransferError(f"layer {layer} has other heads, widths or numbers here than there")


def _layers(layout: KVLayout) -> Iterator[tuple[int, tuple[FieldLayout, ...]]]:
    """(bytes, fields) by layer."""
    for run in layout.runs:
        yield from [(run.layer_bytes, run.fields)] * run.num_layers


def _firsts(layout: KVLayout, field: FieldLayout) -> list[int]:
    """The first heads of all different shares of the ranks that hold that layout's model."""
    return list(range(0, field.total_heads, field.num_heads))


def _sends(layout: KVLayout, field: FieldLayout) -> bool:
    """Whether a rank is the first of those that hold its heads."""
    shares, num_ranks = field.total_heads // field.num_heads, layout.num_ranks
    return layout.rank == 0 or (layout.rank - 1) * shares // num_ranks != layout.rank * shares // num_ranks


def _overlap(source: FieldLayout, target: FieldLayout) -> tuple[slice, slice] | None:
    """The heads that both have, as slices of each."""
    low = max(source.first_head, target.first_head)
    high = min(source.first_head + source.num_heads, target.first_head + target.num_heads)
    if low >= high:
        return None
    return (slice(low - source.first_head, high - source.first_head),
            slice(low - target.first_head, high - target.first_head))


def _view(layer_BX: np.ndarray, field: FieldLayout, block_size: int, item_bytes: int) -> np.ndarray:
    """[block, head, position, number, byte] of a field; what is written to it is written to the bytes."""
    shape = (len(layer_BX), field.num_heads, block_size, field.width, item_bytes)
    strides = (layer_BX.strides[0], field.head_stride, field.position_stride, field.number_stride, 1)
    return np.lib.stride_tricks.as_strided(layer_BX[:, field.offset :], shape, strides)


def _place(target_BKPHX: np.ndarray, values_BKPHX: np.ndarray, first: int, first_there: int) -> None:
    """Write positions first, first + 1, ... of a path, in blocks of one size, to where they are in blocks of another,
    the first of which begins at position `first_there`."""
    p, q = values_BKPHX.shape[2], target_BKPHX.shape[2]
    if p == q:
        at = (first - first_there) // q
        target_BKPHX[at : at + len(values_BKPHX)] = values_BKPHX
        return
    step = min(p, q)
    for done in range(0, len(values_BKPHX) * p, step):
        at = first - first_there + done
        target_BKPHX[at // q, :, at % q : at % q + step] = values_BKPHX[done // p, :, done % p : done % p + step]


def _bytes(array: np.ndarray) -> memoryview:
    return array.data


def _runs(marks: np.ndarray) -> Iterator[tuple[int, int]]:
    """(start, end) of each run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], marks, [False])).astype(np.int8)))
    return zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)
