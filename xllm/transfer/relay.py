"""`Relay`: puts the bytes of one rank's KV blocks into the order in which a rank of another instance stores them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from xllm.errors import TransferError
from xllm.kv_layout import FieldLayout, KVLayout
from xllm.transfer.laying import Laying, SharedField

StoredLayer = tuple[int, tuple[FieldLayout, ...]]  # bytes, fields


class LaidPiece(NamedTuple):
    """data belongs at `offset` of the target's stored block number `block` of the path."""

    block: int
    offset: int
    data: memoryview


class Relay:
    """From rank `source` to rank `target`, which hold the same model. One thread uses it.

    shares: whether anything goes from here to there: of ranks that hold the same heads the first one sends. num_peers:
    how many source ranks send to that target. source: in the number format of the target.

    Raises TransferError, naming what does not fit: a layout comes from another machine.
    """

    def __init__(self, source: KVLayout, target: KVLayout):
        layers = _layers_of_both(source, target)
        self._p, self._q = source.block_size, target.block_size
        *self._starts, self.block_bytes = accumulate((layer_bytes for _, (layer_bytes, _) in layers), initial=0)
        self._are_same = [self._p == self._q and mine == theirs for mine, theirs in layers]
        layings = {pair: Laying(_shared(source, *pair), self._p, self._q, pair[1][0]) for pair in layers}
        self._layings = [layings[pair] for pair in layers]
        self.shares = not all(laying.is_empty for laying in layings.values())
        self.num_peers = len({rank for mine, theirs in layings for pair in zip(mine[1], theirs[1], strict=True)
                              for rank in _senders(source.num_ranks, *pair)})

    def pieces(self, layer: int, first: int, layer_BX: np.ndarray) -> list[LaidPiece]:
        """layer_BX: uint8 [n, bytes of the source's layer] in the target's number format: blocks first, first + 1, ...
        of the path, of the source's size. The pieces may be views of it."""
        laying, start = self._layings[layer], self._starts[layer]
        if laying.is_empty or not len(layer_BX):
            return []
        low, high = first * self._p, (first + len(layer_BX)) * self._p  # positions of the path
        laid_BX = layer_BX if self._are_same[layer] else laying.lay(layer_BX, first)
        size, data = laid_BX.shape[1], np.ascontiguousarray(laid_BX).reshape(-1).data
        first_block, num_blocks = low // self._q, -(-high // self._q) - low // self._q
        pieces, whole = [], laying.runs(0, self._q)
        for i in range(num_blocks):
            begin, runs = (first_block + i) * self._q, whole
            if low > begin or high < begin + self._q:
                runs = laying.runs(max(0, low - begin), min(self._q, high - begin))
            for at, end in runs:
                pieces.append(LaidPiece(first_block + i, start + at, data[i * size + at : i * size + end]))
        return pieces


def _layers_of_both(source: KVLayout, target: KVLayout) -> list[tuple[StoredLayer, StoredLayer]]:
    """Each layer here and there. Raises TransferError."""
    _check_sense(source, "here")
    _check_sense(target, "there")
    if source.format != target.format:
        raise TransferError(f"KV is stored there as {target.format}, and is sent as {source.format}")
    if source.block_size % target.block_size and target.block_size % source.block_size:
        raise TransferError(f"KV blocks of {source.block_size} tokens here and {target.block_size} there do not divide")
    num_layers = [sum(run.num_layers for run in layout.runs) for layout in (source, target)]
    if num_layers[0] != num_layers[1]:
        raise TransferError(f"the model has {num_layers[0]} layers here and {num_layers[1]} there")
    mine, theirs = list(_layers(source)), list(_layers(target))
    for layer, ((_, ours), (_, others)) in enumerate(zip(mine, theirs, strict=True)):
        same = len(ours) == len(others) and all(
            (a.width, a.total_heads, a.item_bytes) == (b.width, b.total_heads, b.item_bytes)
            for a, b in zip(ours, others, strict=True))
        if not same:
            raise TransferError(f"layer {layer} has other heads, widths or numbers here than there")
    return list(zip(mine, theirs, strict=True))


def _layers(layout: KVLayout) -> Iterator[StoredLayer]:
    for run in layout.runs:
        yield from [(run.layer_bytes, run.fields)] * run.num_layers


def _check_sense(layout: KVLayout, where: str) -> None:
    """Raises TransferError where by this layout something would be read or written that is not there."""
    sizes = (layout.block_size, *(run.num_layers for run in layout.runs))
    if min(sizes) < 1 or not layout.runs or not 0 <= layout.rank < layout.num_ranks:
        raise TransferError(f"the layout of KV blocks {where} makes no sense")
    layer = 0
    for run in layout.runs:
        for i, field in enumerate(run.fields):
            _check_field(layout, field, run.layer_bytes, f"field {i} of layer {layer} {where}")
        if sum(f.num_heads * layout.block_size * f.width * f.item_bytes for f in run.fields) != run.layer_bytes:
            raise TransferError(f"the fields of layer {layer} {where} do not fill its {run.layer_bytes} bytes")
        layer += run.num_layers


def _check_field(layout: KVLayout, f: FieldLayout, layer_bytes: int, name: str) -> None:
    if f.num_heads < 1 or f.total_heads % f.num_heads or f.first_head != _first_head(layout, f):
        raise TransferError(f"{name} has no such heads: {f.num_heads} of {f.total_heads} from {f.first_head}")
    strides, sizes = (f.head_stride, f.position_stride, f.number_stride), (f.num_heads, layout.block_size, f.width)
    end = f.offset + f.item_bytes + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    if min(f.offset, *strides) < 0 or min(f.width, f.item_bytes) < 1 or end > layer_bytes:
        raise TransferError(f"{name} lies outside of its {layer_bytes} bytes")


def _first_head(layout: KVLayout, field: FieldLayout) -> int | None:
    """With which head of the model the rank begins. None: its ranks cannot share the heads like that."""
    shares = field.total_heads // field.num_heads  # different runs of heads
    return layout.rank * shares // layout.num_ranks * field.num_heads if 1 <= shares <= layout.num_ranks else None


def _shared(source: KVLayout, mine: StoredLayer, theirs: StoredLayer) -> list[SharedField]:
    """What of a layer goes from rank `source` to the other."""
    return [(one, other, range(max(one.first_head, other.first_head),
                               min(one.first_head + one.num_heads, other.first_head + other.num_heads)))
            for one, other in zip(mine[1], theirs[1], strict=True)
            if source.rank in _senders(source.num_ranks, one, other)]


def _senders(num_ranks: int, one: FieldLayout, other: FieldLayout) -> list[int]:
    """Which of the ranks here send a field there: of each run of heads that is wanted, the first that has it."""
    shares = one.total_heads // one.num_heads
    first, last = other.first_head, other.first_head + other.num_heads - 1
    return [-(-share * num_ranks // shares) for share in range(first // one.num_heads, last // one.num_heads + 1)]
