"""The layout of the KV cache on CUDA, and the ops that move its contents.

The layout, for every kernel here; nothing else states or assumes it:

    K, V  [B, K, P, H]   a position's H numbers are adjacent, as are the P positions of a head: one head of a block is
                         one tile of a matrix, the rows of which the tensor cores take as they lie, keys as well
                         (a transposed view of shared memory costs nothing).

Blocks may lie apart (`stride(0)`). The stored form of a layer's part of a block is `backends/reference/stored_kv.py`'s,
but for the order of the keys' numbers, which is that of the values.

A quantised cache is one of int8 or float8_e4m3fn: one head of a block is P * H codes in that order, and then P scales,
of 4 bytes (fp32) or one (E8M0), so that a row has H + 4 or H + 1 numbers. Kernels take it as int8 and are told by
`SCALE_BYTES`, which is 0 for one of plain numbers. It is stored as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from cuda_ops.kv_codes import encode, from_e4m3, group_scale, size_bits
from cuda_ops.launch import config, launch

PLAIN = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
QUANTISED = {"int8": torch.float32, "fp8": torch.uint8}  # and the dtype of their scales
CODES = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}  # the formats of quantised caches by their dtypes


def cache_shape(num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int) -> tuple[int, int, int, int]:
    return (num_blocks, num_kv_heads, block_size, head_dim)


def block_stride(cache: Tensor) -> int:
    """Numbers from one block to the next; within a block they are adjacent."""
    assert cache.stride()[1:] == torch.empty(cache.shape, device="meta").stride()[1:]
    return cache.stride(0)


def scale_bytes(cache: Tensor) -> int:
    """Bytes of a scale; 0: of a cache that has none."""
    return QUANTISED[CODES[cache.dtype]].itemsize if cache.dtype in CODES else 0


def for_kernels(cache: Tensor) -> Tensor:
    """The codes of a quantised cache as int8, which every device knows; any other as it is."""
    if cache.dtype not in CODES:
        return cache
    P, H = cache.shape[2], cache.shape[3] - scale_bytes(cache)
    by_words = cache.dtype is torch.int8 or P % 16 == 0  # scales are read so
    assert not by_words or (P * H % 4 == 0 and block_stride(cache) % 4 == 0)
    return cache.view(torch.int8)


def check_format(cache: Tensor, format: str) -> None:
    if CODES.get(cache.dtype, format) != format:
        raise ValueError(f"a KV cache of {CODES[cache.dtype]} is stored as that, not as {format}")


@triton.jit(do_not_specialize=["src_ptr", "dst_ptr"])
def copy_blocks_kernel(cache_ptr, src_ptr, dst_ptr, stride, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    src, dst = tl.load(src_ptr + tl.program_id(0)), tl.load(dst_ptr + tl.program_id(0))
    numbers = tl.load(cache_ptr + src * stride + offsets, offsets < size)
    tl.store(cache_ptr + dst * stride + offsets, numbers, offsets < size)


def copy_blocks(cache: Tensor, src_B: Tensor, dst_B: Tensor) -> None:
    cache = for_kernels(cache)
    size, numbers = cache[0].numel(), config("copy_blocks", "any", cache)
    grid = (len(src_B), triton.cdiv(size, numbers["BLOCK"]))
    launch(copy_blocks_kernel, grid, cache, src_B, dst_B, block_stride(cache), size, **numbers)


@triton.jit(do_not_specialize=["ids_ptr"])
def quantise_kernel(
    cache_ptr, ids_ptr, codes_ptr, scales_ptr, stride, num_rows, H,
    FP8: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`ROWS` groups of one block: cache to codes [B, K * P, H] and scales [B, K * P]."""
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    i = tl.arange(0, BLOCK)[None, :]
    number = tl.program_id(0).to(tl.int64)
    inside = (row[:, None] < num_rows) & (i < H)
    source = cache_ptr + tl.load(ids_ptr + number) * stride
    x = tl.load(source + row[:, None] * H + i, inside, 0.0).to(tl.float32)
    kept, scale, usable = group_scale(tl.max(size_bits(x), 1)[:, None], FP8)
    codes = encode(x, scale, usable, FP8)
    tl.store(codes_ptr + (number * num_rows + row[:, None]) * H + i, codes, inside)
    tl.store(scales_ptr + number * num_rows + row[:, None], kept, row[:, None] < num_rows)


@triton.jit(do_not_specialize=["ids_ptr"])
def dequantise_kernel(
    cache_ptr, ids_ptr, codes_ptr, scales_ptr, stride, num_rows, H,
    FP8: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The reverse of `quantise_kernel`."""
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    i = tl.arange(0, BLOCK)[None, :]
    number = tl.program_id(0).to(tl.int64)
    inside = (row[:, None] < num_rows) & (i < H)
    codes = tl.load(codes_ptr + (number * num_rows + row[:, None]) * H + i, inside, 0)
    scale = tl.load(scales_ptr + number * num_rows + row, row < num_rows, 0)
    if FP8:
        y = from_e4m3(codes.to(tl.int32))
        scale = scale.to(tl.int32)
        scale = tl.where(scale == 255, 0x7FC00000, scale << 23).to(tl.float32, bitcast=True)
    else:
        y = codes.to(tl.int8, bitcast=True).to(tl.float32)
    target = cache_ptr + tl.load(ids_ptr + number) * stride
    tl.store(target + row[:, None] * H + i, y * scale[:, None], inside)


def encode_blocks(cache: Tensor, ids_B: Tensor, format: str) -> list[Tensor]:
    """The parts of the stored form of keys or values, each uint8 [B, bytes], one after the other in a store's row."""
    num_blocks, (K, P, H) = len(ids_B), cache.shape[1:]
    if cache.dtype in CODES:
        return [for_kernels(cache)[ids_B].view(num_blocks, -1).view(torch.uint8)]
    if format in PLAIN:
        return [cache[ids_B].to(PLAIN[format]).view(num_blocks, -1).view(torch.uint8)]
    codes = torch.empty(num_blocks, K * P * H, dtype=torch.uint8, device=cache.device)
    scales = torch.empty(num_blocks, K * P, dtype=QUANTISED[format], device=cache.device)
    _launch(quantise_kernel, cache, ids_B, codes, scales, format)
    return [codes, scales.view(torch.uint8)]


def decode_blocks(cache: Tensor, ids_B: Tensor, stored_BX: Tensor, format: str) -> None:
    """cache[ids] = what `encode_blocks` made, all parts of a block in one row."""
    num_blocks, (K, P, H) = len(ids_B), cache.shape[1:]
    if cache.dtype in CODES:
        for_kernels(cache)[ids_B] = stored_BX.view(torch.int8).view(num_blocks, K, P, H)
        return
    if format in PLAIN:
        cache[ids_B] = _aligned(stored_BX, PLAIN[format]).view(num_blocks, K, P, H).to(cache.dtype)
        return
    codes, scales = stored_BX.split([K * P * H, K * P * QUANTISED[format].itemsize], 1)
    _launch(dequantise_kernel, cache, ids_B, codes.contiguous(), _aligned(scales, QUANTISED[format]), format)


def _launch(kernel: object, cache: Tensor, ids_B: Tensor, codes: Tensor, scales: Tensor, format: str) -> None:
    K, P, H = cache.shape[1:]
    numbers = config("quantise", "any", cache)
    launch(kernel, (len(ids_B), triton.cdiv(K * P, numbers["ROWS"])), cache, ids_B, codes, scales, block_stride(cache),
           K * P, H, FP8=format == "fp8", BLOCK=triton.next_power_of_2(H), **numbers)  # fmt: skip


def _aligned(bytes_BX: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy, since a slice of bytes may lie on no multiple of the dtype's size."""
    return bytes_BX.clone(memory_format=torch.contiguous_format).view(dtype)


def part_bytes(cache: Tensor, format: str) -> int:
    """Bytes of one block of one part of one layer."""
    K, P, H = cache.shape[1:]
    if format in PLAIN or cache.dtype in CODES:  # the rows of a quantised cache have their scales in them
        return K * P * H * (1 if cache.dtype in CODES else PLAIN[format].itemsize)
    return K * P * (H + QUANTISED[format].itemsize)


def stored_bytes(caches: Sequence[Tensor], *, format: str) -> int:
    return sum(part_bytes(cache, format) for cache in caches)


def export_blocks(caches: Sequence[Tensor], block_ids_B: Tensor, stored_SX: Tensor, slots_B: Tensor, *,
                  format: str) -> None:
    """Queued on the current stream, as are the copies to host memory if that is pinned."""
    check_format(caches[0], format)
    if not len(block_ids_B):
        return
    ids_B = to_device(block_ids_B, caches[0].device)
    staged_BX = torch.cat([part for cache in caches for part in encode_blocks(cache, ids_B, format)], 1)
    for i, slot in enumerate(slots_B.tolist()):
        stored_SX[slot].copy_(staged_BX[i], non_blocking=True)


def import_blocks(caches: Sequence[Tensor], block_ids_B: Tensor, stored_SX: Tensor, slots_B: Tensor, *,
                  format: str) -> None:
    """Queued on the current stream; from pinned memory nothing waits."""
    check_format(caches[0], format)
    if not len(block_ids_B):
        return
    staged_BX = torch.empty(len(slots_B), stored_SX.shape[1], dtype=torch.uint8, device=caches[0].device)
    for i, slot in enumerate(slots_B.tolist()):
        staged_BX[i].copy_(stored_SX[slot], non_blocking=True)
    ids_B = to_device(block_ids_B, caches[0].device)
    for cache, part_BX in zip(caches, staged_BX.split([part_bytes(cache, format) for cache in caches], 1)):
        decode_blocks(cache, ids_B, part_BX, format)


def to_device(ids_B: Tensor, device: torch.device) -> Tensor:
    """Without waiting: from pinned memory, which the allocator keeps until the copy is done."""
    return ids_B.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else ids_B
