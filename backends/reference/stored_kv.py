"""The stored form of KV blocks, as they lie in host memory and on disk, and the ops that bring them there and back.

One layer's share of a stored block is its parts one after the other, each in the cache's own order
(`reference/kv.py`): keys and then values, or one part alone, which lies as values do.

    fp32 bf16 fp16   the numbers
    int8 fp8         codes [K, X], then scales [K, P] (`reference/kv_codes.py`); X is P * H

A cache of int8 or fp8 is stored in its own format alone, byte for byte.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from backends.reference.kv import keys_BKHP
from backends.reference.kv_codes import FP8, QUANTISED, SCALE_BYTES, dequantise, quantise
from backends.stored_field import StoredField, StoredPart, fields_of

FORMATS = ("fp32", "bf16", "fp16", "int8", "fp8")
PLAIN = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CODES = {"int8": (torch.int8, torch.float32), "fp8": (FP8, torch.uint8)}  # dtypes of codes and scales


def stored_bytes(caches: Sequence[Tensor], *, format: str) -> int:
    return sum(part_bytes(cache, format) for cache in caches)


def export_blocks(caches: Sequence[Tensor], block_ids_B: Tensor, stored_SX: Tensor, slots_B: Tensor, *,
                  format: str) -> None:
    if caches[0].dtype in QUANTISED:
        check_format(caches[0], format)
        parts = [_bytes(cache.view(torch.uint8)[block_ids_B]) for cache in caches]
    else:
        parts = [_encode(cache[block_ids_B], format, dim) for cache, dim in _in_own_order(caches)]
    stored_SX[slots_B] = torch.cat(parts, dim=1).to(stored_SX.device)


def import_blocks(caches: Sequence[Tensor], block_ids_B: Tensor, stored_SX: Tensor, slots_B: Tensor, *,
                  format: str) -> None:
    if caches[0].dtype in QUANTISED:
        check_format(caches[0], format)
    parts = stored_SX[slots_B].to(caches[0].device).split([part_bytes(cache, format) for cache in caches], 1)
    if caches[0].dtype in QUANTISED:
        for cache, part_BX in zip(caches, parts, strict=True):
            cache.view(torch.uint8)[block_ids_B] = part_BX.view(len(block_ids_B), *cache.shape[1:])
        return
    for (cache, dim), part_BX in zip(_in_own_order(caches), parts, strict=True):
        shape = (len(block_ids_B), *cache.shape[1:])
        cache[block_ids_B] = _decode(part_BX, shape, format, dim).to(cache.dtype)


def lie_transposed(caches: Sequence[Tensor]) -> list[bool]:
    """For each part of a layer whether it is its keys, the first of two."""
    return [len(caches) == 2 and part == 0 for part in range(len(caches))]


def stored_fields(caches: Sequence[Tensor], *, format: str) -> list[StoredField]:
    """Where the numbers of each part lie in a layer's share of a stored block."""
    own = QUANTISED.get(caches[0].dtype)
    parts = []
    for cache, transposed in zip(caches, lie_transposed(caches), strict=True):
        num_heads, block_size, width = cache.shape[1:]
        parts.append(StoredPart(num_heads, block_size, width - (SCALE_BYTES[own] if own else 0),
                                "KHP" if transposed else "KPH"))
    return fields_of(parts, own or format, is_quantised=own is not None)


def _in_own_order(caches: Sequence[Tensor]) -> list[tuple[Tensor, int]]:
    """Each part in the order in which it lies, and the axis that a group of numbers runs along."""
    return [(keys_BKHP(cache), 2) if transposed else (cache, 3)
            for cache, transposed in zip(caches, lie_transposed(caches))]


def part_bytes(cache: Tensor, format: str) -> int:
    """Bytes of one block of one part of one layer."""
    num_kv_heads, block_size, head_dim = cache.shape[1:]
    numbers, groups = num_kv_heads * block_size * head_dim, num_kv_heads * block_size
    if format in PLAIN or cache.dtype in QUANTISED:  # the rows of a quantised cache have their scales in them
        return numbers * (PLAIN[format].itemsize if format in PLAIN else 1)
    return numbers + groups * SCALE_BYTES[format]


def check_format(cache: Tensor, format: str) -> None:
    if QUANTISED[cache.dtype] != format:
        raise ValueError(f"a KV cache of {QUANTISED[cache.dtype]} is stored as that, not as {format}")


def _encode(x_BKRC: Tensor, format: str, dim: int) -> Tensor:
    """uint8 [B, bytes of the part]; `dim` is the one that a group runs along."""
    if format in PLAIN:
        return _bytes(x_BKRC.to(PLAIN[format]))
    return torch.cat([_bytes(part) for part in quantise(x_BKRC, format, dim)], dim=1)


def _decode(part_BX: Tensor, shape: tuple[int, ...], format: str, dim: int) -> Tensor:
    if format in PLAIN:
        return _numbers(part_BX, PLAIN[format]).view(shape)
    size = shape[1] * shape[2] * shape[3]
    codes, scales = (_numbers(part, dtype) for part, dtype in
                     zip((part_BX[:, :size], part_BX[:, size:]), CODES[format], strict=True))
    return dequantise(codes.view(shape), scales.view([*shape[:dim], 1, *shape[dim + 1 :]]), format)


def _bytes(x: Tensor) -> Tensor:
    """The memory of [B, ...] as uint8 [B, bytes]."""
    return x.contiguous().flatten(1).view(torch.uint8)


def _numbers(bytes_BX: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy, since a slice of bytes may lie on no multiple of the dtype's size."""
    return bytes_BX.clone(memory_format=torch.contiguous_format).view(dtype)
