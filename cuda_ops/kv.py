"""The layout of the KV cache on CUDA, and the ops that move its contents.

The layout, for every kernel here; nothing else states or assumes it:

    K, V  [B, K, P, H]   a position's H numbers are adjacent, as are the P positions of a head: one head of a block is
                         one tile of a matrix, the rows of which the tensor cores take as they lie, keys as well
                         (a transposed view of shared memory costs nothing).

Blocks may lie apart (`stride(0)`). The stored form of a layer's part of a block is `backends/reference/stored_kv.py`'s,
but for the order of the keys' numbers, which is that of the values.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cuda_ops.launch import config, launch

PLAIN = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
QUANTISED = {"int8": torch.float32, "fp8": torch.uint8}  # and the dtype of their scales


def cache_shape(num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int) -> tuple[int, int, int, int]:
    return (num_blocks, num_kv_heads, block_size, head_dim)


def block_stride(cache: Tensor) -> int:
    """Numbers from one block to the next; within a block they are adjacent."""
    assert cache.stride()[1:] == torch.empty(cache.shape, device="meta").stride()[1:]
    return cache.stride(0)


@triton.jit(do_not_specialize=["src_ptr", "dst_ptr"])
def copy_blocks_kernel(cache_ptr, src_ptr, dst_ptr, stride, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    src, dst = tl.load(src_ptr + tl.program_id(0)), tl.load(dst_ptr + tl.program_id(0))
    numbers = tl.load(cache_ptr + src * stride + offsets, offsets < size)
    tl.store(cache_ptr + dst * stride + offsets, numbers, offsets < size)


def copy_blocks(cache: Tensor, src_B: Tensor, dst_B: Tensor) -> None:
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
    # The bits of a number without its sign are in the order of their sizes, NaN and inf the largest.
    bits = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
    finite, empty = bits < 0x7F800000, bits < 0x0D800000  # 2^-100
    if FP8:
        exponent = (bits + 0x17FFFF) >> 23
        scale = (tl.where(empty, 0, exponent - 8) << 23).to(tl.float32, bitcast=True)
        kept_scale = tl.where(finite, tl.where(empty, 0, exponent - 8), 255).to(tl.uint8)
    else:
        largest = tl.where(finite, bits, 0).to(tl.float32, bitcast=True)
        scale = tl.div_rn(largest, tl.full(largest.shape, 127.0, tl.float32)).to(tl.int32, bitcast=True)
        scale = tl.where(empty, 0, (scale + 0xFF) & ~0xFF)  # up to 16 significant bits
        kept_scale = tl.where(finite, scale, 0x7FC00000).to(tl.float32, bitcast=True)
        scale = scale.to(tl.float32, bitcast=True)
    usable = finite & (empty == 0)
    divisor = tl.where(usable, scale, 1.0)
    y = tl.where(usable[:, None] & inside, tl.div_rn(x, tl.broadcast_to(divisor[:, None], x.shape)), 0.0)
    if FP8:
        codes = to_e4m3(y)
    else:
        # Adding 1.5 * 2^23 rounds to the nearest even integer and leaves it in the low bits.
        codes = ((y + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000).to(tl.uint8)
    tl.store(codes_ptr + (number * num_rows + row[:, None]) * H + i, codes, inside)
    tl.store(scales_ptr + number * num_rows + row, kept_scale, row < num_rows)


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
        y = _from_e4m3(codes.to(tl.int32))
        scale = scale.to(tl.int32)
        scale = tl.where(scale == 255, 0x7FC00000, scale << 23).to(tl.float32, bitcast=True)
    else:
        y = codes.to(tl.int8, bitcast=True).to(tl.float32)
    target = cache_ptr + tl.load(ids_ptr + number) * stride
    tl.store(target + row[:, None] * H + i, y * scale[:, None], inside)


@triton.jit
def to_e4m3(y):
    """float8_e4m3fn codes of |y| <= 464, rounded to nearest even; in integers, since not every device converts."""
    bits = y.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 the codes are multiples of 2^-9, which is what a number next to 2^14 is rounded to.
    small = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    return (tl.where(size < 0x3C800000, small, normal) | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _from_e4m3(codes):
    size = codes & 0x7F
    normal = ((size << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    y = tl.where(size < 8, size.to(tl.float32) * 0.001953125, normal)
    y = tl.where(size == 0x7F, float("nan"), y)
    return tl.where(codes < 128, y, -y)


def encode_blocks(cache: Tensor, ids_B: Tensor, format: str) -> list[Tensor]:
    """The parts of the stored form of keys or values, each uint8 [B, bytes], one after the other in a store's row."""
    num_blocks, (K, P, H) = len(ids_B), cache.shape[1:]
    if format in PLAIN:
        return [cache[ids_B].to(PLAIN[format]).view(num_blocks, -1).view(torch.uint8)]
    codes = torch.empty(num_blocks, K * P * H, dtype=torch.uint8, device=cache.device)
    scales = torch.empty(num_blocks, K * P, dtype=QUANTISED[format], device=cache.device)
    _launch(quantise_kernel, cache, ids_B, codes, scales, format)
    return [codes, scales.view(torch.uint8)]


def decode_blocks(cache: Tensor, ids_B: Tensor, stored_BX: Tensor, format: str) -> None:
    """cache[ids] = what `encode_blocks` made, all parts of a block in one row."""
    num_blocks, (K, P, H) = len(ids_B), cache.shape[1:]
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
    """Bytes of one block's keys, or values, of one layer."""
    K, P, H = cache.shape[1:]
    if format in PLAIN:
        return K * P * H * PLAIN[format].itemsize
    return K * P * (H + QUANTISED[format].itemsize)


def stored_bytes(k_cache: Tensor, v_cache: Tensor, *, format: str) -> int:
    return part_bytes(k_cache, format) + part_bytes(v_cache, format)


def export_blocks(k_cache: Tensor, v_cache: Tensor, block_ids_B: Tensor, stored_SX: Tensor, slots_B: Tensor, *,
                  format: str) -> None:
    """Queued on the current stream, as are the copies to host memory if that is pinned."""
    if not len(block_ids_B):
        return
    ids_B = to_device(block_ids_B, k_cache.device)
    staged_BX = torch.cat([part for cache in (k_cache, v_cache) for part in encode_blocks(cache, ids_B, format)], 1)
    for i, slot in enumerate(slots_B.tolist()):
        stored_SX[slot].copy_(staged_BX[i], non_blocking=True)


def import_blocks(k_cache: Tensor, v_cache: Tensor, block_ids_B: Tensor, stored_SX: Tensor, slots_B: Tensor, *,
                  format: str) -> None:
    """Queued on the current stream; from pinned memory nothing waits."""
    if not len(block_ids_B):
        return
    staged_BX = torch.empty(len(slots_B), stored_SX.shape[1], dtype=torch.uint8, device=k_cache.device)
    for i, slot in enumerate(slots_B.tolist()):
        staged_BX[i].copy_(stored_SX[slot], non_blocking=True)
    ids_B = to_device(block_ids_B, k_cache.device)
    keys_BX, values_BX = staged_BX.split([part_bytes(k_cache, format), part_bytes(v_cache, format)], 1)
    decode_blocks(k_cache, ids_B, keys_BX, format)
    decode_blocks(v_cache, ids_B, values_BX, format)


def to_device(ids_B: Tensor, device: torch.device) -> Tensor:
    """Without waiting: from pinned memory, which the allocator keeps until the copy is done."""
    return ids_B.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else ids_B
