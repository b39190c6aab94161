"""`KVLayout`: how the bytes of a KV block lie in the stored form of one rank, as plain values that cross between
instances.

A stored block is its layers one after the other; a layer is its fields one after the other; a field is an array of
heads and positions, in either order, with so many bytes for each head of each position
(`backends/reference/stored_kv.py`).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldLayout:
    """One array of a layer: codes, scales or plain numbers of one part.

    axes: the order of H (heads), P (positions) and W (numbers of one head at one position), the slowest first; W may be
    missing where there is one number a head and position. num_heads: of this rank; first_head: which of all heads of
    the model its first one is; total_heads: of the model. width: numbers along W. item_bytes: of one number.
    """

    name: str
    axes: str
    first_head: int
    num_heads: int
    total_heads: int
    width: int
    item_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRun:
    """Neighbouring layers that lie alike."""

    num_layers: int
    fields: tuple[FieldLayout, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class KVLayout:
    """Of one rank's stored blocks. format: of the numbers, as `--kv-store-dtype` names it, and the version of the
    stored form. block_size: positions of a block."""

    format: str
    block_size: int
    runs: tuple[LayerRun, ...]
