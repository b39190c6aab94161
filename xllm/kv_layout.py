"""`KVLayout`: how the bytes of a KV block lie in the stored form of one rank, as plain values that cross between
instances.

A stored block is its layers one after the other; a layer is made of fields: an array each of heads, positions and
numbers, in whichever order (`Backend.stored_fields`).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldLayout:
    """One array of a layer: plain numbers, codes or scales of one part of it.

    offset: of its first byte in the layer. Strides in bytes, from one head, position or number to the next. width:
    numbers of one head at one position. item_bytes: of a number. num_heads: of this rank; first_head: which of the
    model's it begins with; total_heads: of the model.
    """

    offset: int
    head_stride: int
    position_stride: int
    number_stride: int
    width: int
    item_bytes: int
    num_heads: int
    first_head: int = 0
    total_heads: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRun:
    """Neighbouring layers that lie alike. layer_bytes: of one of them."""

    num_layers: int
    layer_bytes: int
    fields: tuple[FieldLayout, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class KVLayout:
    """Of one rank's stored blocks. format: of the numbers, and the version of the stored form (`KVCodec.name`).
    block_size: positions of a block. rank: of so many."""

    format: str
    block_size: int
    runs: tuple[LayerRun, ...]
    rank: int = 0
    num_ranks: int = 1
