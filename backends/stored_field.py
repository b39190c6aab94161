"""`StoredField`: where the numbers of one part of a layer lie in the stored form of a KV block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate

SCALE_BYTES = {"int8": 4, "fp8": 1}
NUMBER_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1, "fp8": 1}


@dataclass(frozen=True)
class StoredField:
    """An array of heads, positions and numbers. offset: of its first byte in the layer; strides in bytes. width:
    numbers of one head at one position."""

    offset: int
    head_stride: int
    position_stride: int
    number_stride: int
    width: int
    item_bytes: int
    num_heads: int


@dataclass(frozen=True)
class StoredPart:
    """One part of a layer, as a backend keeps it. order: of K (heads), P (positions) and H (numbers), the slowest
    first. width: without scales."""

    num_heads: int
    block_size: int
    width: int
    order: str


def fields_of(parts: Iterable[StoredPart], format: str, *, is_quantised: bool) -> list[StoredField]:
    """The fields of a layer of these parts. is_quantised: the cache itself has this format, and is stored byte for
    byte."""
    fields: list[StoredField] = []
    offset = 0
    for part in parts:
        fields += (_tiles if is_quantised else _plain_or_coded)(offset, part, format)
        numbers, groups = part.num_heads * part.block_size * part.width, part.num_heads * part.block_size
        offset += numbers * NUMBER_BYTES[format] + groups * SCALE_BYTES.get(format, 0)
    return fields


def _array(offset: int, order: str, num_heads: int, block_size: int, width: int, item_bytes: int) -> StoredField:
    """A field without gaps. order: of K (heads), P (positions) and H (numbers), the slowest first."""
    sizes = {"K": num_heads, "P": block_size, "H": width}
    steps = list(accumulate((sizes[axis] for axis in reversed(order[1:])), lambda a, b: a * b, initial=item_bytes))
    stride = dict(zip(reversed(order), steps, strict=True))
    return StoredField(offset, stride["K"], stride["P"], stride["H"], width, item_bytes, num_heads)


def _plain_or_coded(offset: int, part: StoredPart, format: str) -> Iterator[StoredField]:
    """Numbers; or codes, and behind all of them a scale for each head and position."""
    num_heads, block_size = part.num_heads, part.block_size
    yield _array(offset, part.order, num_heads, block_size, part.width, NUMBER_BYTES[format])
    if format in SCALE_BYTES:
        behind = offset + num_heads * block_size * part.width
        yield _array(behind, part.order.replace("H", "") + "H", num_heads, block_size, 1, SCALE_BYTES[format])


def _tiles(offset: int, part: StoredPart, format: str) -> Iterator[StoredField]:
    """For each head its codes, and then their scales."""
    assert part.order[0] == "K"
    block_size, scale = part.block_size, SCALE_BYTES[format]
    tile_bytes = block_size * (part.width + scale)
    codes = _array(offset, part.order, 1, block_size, part.width, 1)
    yield StoredField(offset, tile_bytes, codes.position_stride, codes.number_stride, part.width, 1, part.num_heads)
    yield StoredField(offset + block_size * part.width, tile_bytes, scale, scale, 1, scale, part.num_heads)
