"""Layouts of the ranks of an engine for tests of `Relay`, and a slow model of what their blocks hold."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np

from backends.stored_field import NUMBER_BYTES, SCALE_BYTES, StoredPart, fields_of
from xllm.kv_layout import FieldLayout, KVLayout, LayerRun

Key = tuple[int, int, int, int, int]  # layer, field, head of the model, position of the path, number


@dataclass(frozen=True)
class Layers:
    """Layers of the model that are alike. widths: numbers of a head in each part (keys and values, or one latent)."""

    num_layers: int
    num_heads: int
    widths: tuple[int, ...]


@dataclass(frozen=True)
class Engine:
    """orders: of the first part of a layer, and of the others. has_tiles: its cache is quantised."""

    block_size: int
    num_ranks: int
    orders: tuple[str, str]
    has_tiles: bool = False


def layouts(engine: Engine, model: tuple[Layers, ...], format: str) -> list[KVLayout]:
    """Of each rank."""
    return [KVLayout(format=f"{format}.1", block_size=engine.block_size, rank=rank, num_ranks=engine.num_ranks,
                     runs=tuple(_run(engine, layers, format, rank) for layers in model))
            for rank in range(engine.num_ranks)]


def _run(engine: Engine, layers: Layers, format: str, rank: int) -> LayerRun:
    total, num_ranks = layers.num_heads, engine.num_ranks
    num_heads = max(1, total // num_ranks)
    first_head = rank * num_heads if total >= num_ranks else rank // (num_ranks // total)
    parts = [StoredPart(num_heads, engine.block_size, width, engine.orders[min(i, 1)])
             for i, width in enumerate(layers.widths)]
    fields = tuple(FieldLayout(offset=f.offset, head_stride=f.head_stride, position_stride=f.position_stride,
                               number_stride=f.number_stride, width=f.width, item_bytes=f.item_bytes,
                               num_heads=f.num_heads, first_head=first_head, total_heads=total)
                   for f in fields_of(parts, format, is_quantised=engine.has_tiles))
    layer_bytes = sum(num_heads * engine.block_size * (width * NUMBER_BYTES[format] + SCALE_BYTES.get(format, 0))
                      for width in layers.widths)
    return LayerRun(num_layers=layers.num_layers, layer_bytes=layer_bytes, fields=fields)


def places(layout: KVLayout, block: int) -> Iterator[tuple[Key, int, int]]:
    """(key, offset in the stored block, bytes) of each number in a block of the path."""
    start = layer = 0
    for run in layout.runs:
        for _ in range(run.num_layers):
            for i, f in enumerate(run.fields):
                for head, position, number in product(*map(range, (f.num_heads, layout.block_size, f.width))):
                    offset = f.offset + head * f.head_stride + position * f.position_stride + number * f.number_stride
                    key = (layer, i, f.first_head + head, block * layout.block_size + position, number)
                    yield key, start + offset, f.item_bytes
            start, layer = start + run.layer_bytes, layer + 1


@lru_cache(maxsize=2**16)
def value(key: Key, num_bytes: int) -> bytes:
    """What the model computes there."""
    return hashlib.blake2b(repr(key).encode(), digest_size=num_bytes).digest()


def stored(layout: KVLayout, blocks: range) -> np.ndarray:
    """uint8 [blocks, bytes of a stored block]: what the rank has stored of these blocks of the path."""
    stored_BX = np.zeros((len(blocks), sum(run.num_layers * run.layer_bytes for run in layout.runs)), dtype=np.uint8)
    for row, block in zip(stored_BX, blocks, strict=True):
        for key, offset, size in places(layout, block):
            row[offset : offset + size] = np.frombuffer(value(key, size), dtype=np.uint8)
    return stored_BX


def by_layer(layout: KVLayout, stored_BX: np.ndarray) -> list[np.ndarray]:
    """Each layer of stored blocks, as `KVReader.read` gives it."""
    sizes = [run.layer_bytes for run in layout.runs for _ in range(run.num_layers)]
    ends = np.cumsum(sizes)
    return [np.ascontiguousarray(stored_BX[:, end - size : end]) for size, end in zip(sizes, ends, strict=True)]
