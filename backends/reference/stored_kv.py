"""The stored form of KV blocks, as they lie in host memory and on disk, and the ops that bring them there and back.

One layer's part of a stored block is its keys and then its values, each in the cache's own order (`reference/kv.py`):

    fp32 bf16 fp16   the numbers
    int8             codes [K, X], then fp32 scales [K, P]: number = code * scale
    fp8              float8_e4m3fn codes [K, X], then E8M0 scales [K, P]: number = code * 2^(scale - 127)

X is P * H. A quantised group is one head's key, or value, of one position. Its scale is the smallest that holds its
largest number, rounded such that what was read from the store is stored again as the same bytes: up to 16 significant
bits for int8 (a code times a scale is then exact in fp32), to a power of two for fp8. A group below 2^-100 is stored
as zeros. A group with an inf or a NaN in it is read as NaN, all of it.

E8M0 and one scale a group: OCP Microscaling Formats (MX) 1.0, 2023, with groups of H instead of 32 numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from backends.reference.kv import keys_BKHP

FORMATS = ("fp32", "bf16", "fp16", "int8", "fp8")
PLAIN = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TINY = 2.0**-100
FP8 = torch.float8_e4m3fn
FP8_NAN = 255


def stored_bytes(k_cache: Tensor, v_cache: Tensor, *, format: str) -> int:
    return sum(part_bytes(cache, format) for cache in (k_cache, v_cache))


def export_blocks(k_cache: Tensor, v_cache: Tensor, block_ids_B: Tensor, stored_SX: Tensor, slots_B: Tensor, *,
                  format: str) -> None:
    keys = _encode(keys_BKHP(k_cache)[block_ids_B], format, dim=2)
    values = _encode(v_cache[block_ids_B], format, dim=3)
    stored_SX[slots_B] = torch.cat((keys, values), dim=1).to(stored_SX.device)


def import_blocks(k_cache: Tensor, v_cache: Tensor, block_ids_B: Tensor, stored_SX: Tensor, slots_B: Tensor, *,
                  format: str) -> None:
    parts = stored_SX[slots_B].to(k_cache.device).split([part_bytes(k_cache, format), part_bytes(v_cache, format)], 1)
    for cache, part_BX, dim in ((keys_BKHP(k_cache), parts[0], 2), (v_cache, parts[1], 3)):
        shape = (len(block_ids_B), *cache.shape[1:])
        cache[block_ids_B] = _decode(part_BX, shape, format, dim).to(cache.dtype)


def part_bytes(cache: Tensor, format: str) -> int:
    """Bytes of one block's keys, or values, of one layer."""
    num_kv_heads, block_size, head_dim = cache.shape[1:]
    numbers, groups = num_kv_heads * block_size * head_dim, num_kv_heads * block_size
    return numbers * PLAIN[format].itemsize if format in PLAIN else numbers + groups * (4 if format == "int8" else 1)


def _encode(x_BKRC: Tensor, format: str, dim: int) -> Tensor:
    """uint8 [B, bytes of the part]; `dim` is the one that a group runs along."""
    if format in PLAIN:
        return _bytes(x_BKRC.to(PLAIN[format]))
    x = x_BKRC.float()
    largest = x.abs().amax(dim, keepdim=True)
    finite, empty = largest.isfinite(), largest < TINY
    scale = _int8_scale(largest) if format == "int8" else _fp8_scale(largest)
    y = torch.where(finite & ~empty, x / scale, 0.0)
    if format == "int8":
        return torch.cat((_bytes(y.round().to(torch.int8)), _bytes(scale)), dim=1)
    exponent = (scale.view(torch.int32) >> 23).to(torch.uint8)
    return torch.cat((_bytes(y.to(FP8)), _bytes(torch.where(finite, exponent, FP8_NAN))), dim=1)


def _decode(part_BX: Tensor, shape: tuple[int, ...], format: str, dim: int) -> Tensor:
    if format in PLAIN:
        return _numbers(part_BX, PLAIN[format]).view(shape)
    size = shape[1] * shape[2] * shape[3]
    groups = [*shape[:dim], 1, *shape[dim + 1 :]]
    codes, scales = part_BX[:, :size], part_BX[:, size:]
    if format == "int8":
        return _numbers(codes, torch.int8).view(shape).float() * _numbers(scales, torch.float32).view(groups)
    exponent = scales.reshape(groups).int()
    scale = torch.where(exponent == FP8_NAN, torch.nan, (exponent << 23).view(torch.float32))
    return _numbers(codes, FP8).view(shape).float() * scale


def _int8_scale(largest: Tensor) -> Tensor:
    """largest / 127, up to the next number of 16 significant bits."""
    scale = (((largest / 127).view(torch.int32) + 0xFF) & ~0xFF).view(torch.float32)
    return torch.where(largest.isfinite(), torch.where(largest < TINY, 0.0, scale), torch.nan)


def _fp8_scale(largest: Tensor) -> Tensor:
    """The power of two that brings `largest` into (232, 464]: what is rounded to at most 448, and stays in there."""
    raised = largest.view(torch.int32) + 0x17FFFF  # the exponent is one higher from a mantissa of 1.8125 on
    return torch.where(largest < TINY, 0, ((raised >> 23) - 8) << 23).view(torch.float32)


def _bytes(x: Tensor) -> Tensor:
    """The memory of [B, ...] as uint8 [B, bytes]."""
    return x.contiguous().flatten(1).view(torch.uint8)


def _numbers(bytes_BX: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy, since a slice of bytes may lie on no multiple of the dtype's size."""
    return bytes_BX.clone(memory_format=torch.contiguous_format).view(dtype)
