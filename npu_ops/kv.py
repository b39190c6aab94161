"""The layout of the KV cache on an NPU, and the ops that move its contents.

The layout, for every operator here; nothing else states or assumes it:

    K, V  [B, P, K, H]   a position's heads are adjacent, so that a block is P rows of K * H numbers: what attention
                         wants ([B, P, K * H]) and what the operator that writes wants ([B, P, K, H], "Norm").
    latents  [B, P, 1, L] and what is rotated of them, [B, P, 1, R], in a tensor of its own: "keys" and "values" of one
                         head for the operator that writes.

Block 0 is nobody's: padding tokens are written there. Ascend's operators take dense tensors only. Where blocks lie
apart (`stride(0)`), because a page holds those of all layers, the whole range is passed as one dense cache of which
every R-th block is the layer's (`Dense`). No view of blocks that lie apart goes to an operator: CANN makes such a view
dense first, which copies the whole range, pages that show nothing included. The stored form of a layer's part of a
block is that of `backends/reference/stored_kv.py`, with the numbers in the order of this layout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from npu_ops.contracts import BLOCK_SIZES, LATENT_BLOCK_SIZES, LATENT_WIDTHS, check

PLAIN = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SCALES = {"int8": torch.float32, "fp8": torch.uint8}  # dtypes of the quantised forms' scales
# The attention operator counts a cache's numbers in 32 bits: what lies beyond is read from a wrong place, and no error.
MAX_CACHE_NUMBERS = 2**31 - 1
TINY_BITS, INF_BITS, NAN_BITS = 0x0D800000, 0x7F800000, 0x7FC00000  # 2^-100, inf, NaN as float32


def cache_shape(num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int) -> tuple[int, int, int, int]:
    """Raises ValueError for what the attention operator does not take."""
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"attention on an NPU takes blocks of {', '.join(map(str, BLOCK_SIZES))} tokens, not of "
                         f"{block_size}")
    if head_dim % 16 or head_dim > 512:
        raise ValueError(f"attention on an NPU takes head dimensions of a multiple of 16 up to 512, not {head_dim}")
    if num_kv_heads * head_dim > 65535:
        raise ValueError(f"attention on an NPU takes up to 65535 numbers a position, not {num_kv_heads * head_dim}")
    return (num_blocks, block_size, num_kv_heads, head_dim)


def latent_cache_shapes(num_blocks: int, block_size: int, latent_width: int,
                        rotated_width: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Raises ValueError for what the attention operator does not take."""
    if (latent_width, rotated_width) != LATENT_WIDTHS:
        raise ValueError(f"attention over latents on an NPU takes latents of {LATENT_WIDTHS[0]} numbers and "
                         f"{LATENT_WIDTHS[1]} rotated ones, not of {latent_width} and {rotated_width}")
    if block_size not in LATENT_BLOCK_SIZES:
        raise ValueError(f"attention over latents on an NPU takes blocks of "
                         f"{' or '.join(map(str, LATENT_BLOCK_SIZES))} tokens, not of {block_size}")
    return (num_blocks, block_size, 1, latent_width), (num_blocks, block_size, 1, rotated_width)


@dataclass(frozen=True, slots=True)
class Dense:
    """A cache as one dense tensor [D, P, K, H] in which block b of the cache is block b * every."""

    cache: Tensor
    every: int

    @classmethod
    def of(cls, cache: Tensor) -> Dense:
        """Views only. Raises ValueError where blocks lie apart by no multiple of their size, or for a block size that
        is no power of two then."""
        num_blocks, *shape = cache.shape
        size = math.prod(shape)
        every, rest = divmod(cache.stride(0), size)
        if rest or (every > 1 and shape[0] & (shape[0] - 1)):
            raise ValueError(f"a page of {cache.stride(0)} numbers must hold a whole number of blocks of {shape}, of a "
                             "power of two of tokens: take kv_layout paged")
        if every == 1:
            return cls(cache, 1)
        count = (num_blocks - 1) * every + 1
        return cls(cache.as_strided((count, *shape), (size, *cache.stride()[1:])), every)

    def slots(self, slot_mapping_T: Tensor) -> Tensor:
        """The slots of the dense tensor for those of the cache; int64 where they may be larger."""
        if self.every == 1:
            return slot_mapping_T
        slots, block_size = slot_mapping_T.long(), self.cache.shape[1]
        return slots + (slots & -block_size) * (self.every - 1)

    def blocks(self, block_ids: Tensor) -> Tensor:
        return block_ids if self.every == 1 else block_ids * self.every

    @property
    def rows_BPX(self) -> Tensor:
        """[D, P, K * H]"""
        return self.cache.flatten(2)


def write_kv(*, key_TKH: Tensor, value_TKH: Tensor, key: Dense, value: Dense, slots_T: Tensor) -> None:
    """Store the keys and values of T tokens at slots of the dense caches (`Dense.slots`)."""
    arguments = {"key": key_TKH, "value": value_TKH, "key_cache": key.cache, "value_cache": value.cache,
                 "slot_mapping": slots_T, "cache_mode": "Norm"}
    check("npu_scatter_pa_kv_cache", **arguments)
    torch.ops.npu.npu_scatter_pa_kv_cache(**arguments)


def copy_blocks(cache: Tensor, src_B: Tensor, dst_B: Tensor) -> None:
    """Where blocks lie apart this waits for the device, whose block ids it needs on the host."""
    if cache.is_contiguous():
        cache.index_copy_(0, dst_B, cache.index_select(0, src_B))
    else:
        put_blocks(cache, dst_B, take_blocks(cache, src_B))


def take_blocks(cache: Tensor, ids_B: Tensor) -> Tensor:
    """Copies of blocks: [B, P, K, H]. ids_B: on the host, where blocks lie apart."""
    if cache.is_contiguous():
        return cache.index_select(0, to_device(ids_B, cache.device))
    blocks = cache.new_empty((len(ids_B), *cache.shape[1:]))
    for i, block in enumerate(ids_B.tolist()):
        blocks[i].copy_(cache[block])
    return blocks


def put_blocks(cache: Tensor, ids_B: Tensor, blocks_BPKH: Tensor) -> None:
    """The way back. ids_B: as in `take_blocks`."""
    if cache.is_contiguous():
        cache.index_copy_(0, to_device(ids_B, cache.device), blocks_BPKH)
        return
    for i, block in enumerate(ids_B.tolist()):
        cache[block].copy_(blocks_BPKH[i])


# --- the stored form


def part_bytes(cache: Tensor, format: str) -> int:
    """Bytes of one block of one part of one layer."""
    P, K, H = cache.shape[1:]
    return P * K * H * PLAIN[format].itemsize if format in PLAIN else P * K * (H + SCALES[format].itemsize)


def stored_bytes(caches: Sequence[Tensor], *, format: str) -> int:
    return sum(part_bytes(cache, format) for cache in caches)


def export_blocks(caches: Sequence[Tensor], block_ids_B: Tensor, stored_SX: Tensor, slots_B: Tensor, *,
                  format: str) -> None:
    """Queued on the current stream, as are the copies to host memory if that is pinned."""
    if not len(block_ids_B):
        return
    parts = [part for cache in caches for part in encode(take_blocks(cache, block_ids_B), format)]
    staged_BX = torch.cat(parts, dim=1)
    for i, slot in enumerate(slots_B.tolist()):
        stored_SX[slot].copy_(staged_BX[i], non_blocking=True)


def import_blocks(caches: Sequence[Tensor], block_ids_B: Tensor, stored_SX: Tensor, slots_B: Tensor, *,
                  format: str) -> None:
    """Queued on the current stream; from pinned memory nothing waits."""
    if not len(block_ids_B):
        return
    staged_BX = torch.empty(len(slots_B), stored_SX.shape[1], dtype=torch.uint8, device=caches[0].device)
    for i, slot in enumerate(slots_B.tolist()):
        staged_BX[i].copy_(stored_SX[slot], non_blocking=True)
    for cache, part_BX in zip(caches, staged_BX.split([part_bytes(cache, format) for cache in caches], dim=1)):
        blocks = decode(part_BX, (len(block_ids_B), *cache.shape[1:]), format)
        put_blocks(cache, block_ids_B, blocks.to(cache.dtype))


def encode(x_BPKH: Tensor, format: str) -> list[Tensor]:
    """The parts of the stored form, each uint8 [B, bytes]."""
    if format in PLAIN:
        return [_bytes(x_BPKH.to(PLAIN[format]))]
    x = x_BPKH.float()
    bits = _float_bits(x.abs().amax(dim=3, keepdim=True))
    finite, empty = bits < INF_BITS, bits < TINY_BITS
    scale_bits = _shifted(bits + 0x17FFFF, 23) - 8 if format == "fp8" else _int8_scale_bits(bits, finite)
    scale_bits = torch.where(empty, 0, scale_bits)
    usable = finite & ~empty
    divisor = _float_of(scale_bits * 2**23 if format == "fp8" else scale_bits)
    y = torch.where(usable, x / torch.where(usable, divisor, 1.0), 0.0)
    if format == "fp8":
        return [_bytes(_to_e4m3(y)), _bytes(torch.where(finite, scale_bits, 255).to(torch.uint8))]
    return [_bytes(y.round().to(torch.int8)), _bytes(_float_of(torch.where(finite, scale_bits, NAN_BITS)))]


def decode(part_BX: Tensor, shape: tuple[int, ...], format: str) -> Tensor:
    """The blocks of `encode`d parts: [B, P, K, H], in float32 for the quantised forms."""
    if format in PLAIN:
        return _numbers(part_BX, PLAIN[format]).view(shape)
    size, groups = math.prod(shape[1:]), (*shape[:3], 1)
    codes, scales = part_BX[:, :size], _numbers(part_BX[:, size:], SCALES[format]).view(groups)
    if format == "int8":
        return _numbers(codes, torch.int8).view(shape).float() * scales
    exponent = scales.int()
    scale = _float_of(torch.where(exponent == 255, NAN_BITS, exponent * 2**23))
    return _from_e4m3(codes.int()).view(shape) * scale


def _int8_scale_bits(bits: Tensor, finite: Tensor) -> Tensor:
    """largest / 127, up to the next number of 16 significant bits."""
    largest = _float_of(torch.where(finite, bits, 0))
    return (_float_bits(largest / 127) + 0xFF) & ~0xFF


def _to_e4m3(y: Tensor) -> Tensor:
    """float8_e4m3fn codes of |y| <= 464, to nearest even, in integers: A2 and A3 do not know the dtype."""
    size = _float_bits(y.abs())
    whole = _shifted(size, 20)
    normal = _shifted(size + 0x7FFFF + (whole & 1), 20) - 120 * 8
    # Below 2^-6 codes are multiples of 2^-9, which is what a number next to 2^14 is rounded to.
    small = _float_bits(y.abs() + 16384.0) - 0x46800000
    codes = torch.where(whole < 0x3C8, small, normal)
    return (codes + torch.where(_float_bits(y) < 0, 128, 0)).to(torch.uint8)


def _from_e4m3(codes: Tensor) -> Tensor:
    size = codes & 127
    y = torch.where(size < 8, size.float() * 2.0**-9, _float_of(size * 2**20 + 120 * 2**23))
    y = torch.where(size == 127, math.nan, y)
    return torch.where(codes < 128, y, -y)


def _shifted(bits: Tensor, count: int) -> Tensor:
    """bits >> count for numbers of which at most 24 bits are left. By a mask and a product of floats, which are exact
    on any device; shifts and divisions of integers are not documented for all."""
    return ((bits & -(1 << count)).float() * 2.0**-count).int()


def _float_bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32)


def _float_of(bits: Tensor) -> Tensor:
    return bits.int().contiguous().view(torch.float32)


def _bytes(x: Tensor) -> Tensor:
    """The memory of [B, ...] as uint8 [B, bytes]."""
    return x.contiguous().flatten(1).view(torch.uint8)


def _numbers(bytes_BX: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy, since a slice of bytes may lie on no multiple of the dtype's size."""
    return bytes_BX.clone(memory_format=torch.contiguous_format).view(dtype)


def to_device(ids_B: Tensor, device: torch.device) -> Tensor:
    """Without waiting: from pinned memory, which the allocator keeps until the copy is done."""
    return ids_B.pin_memory().to(device, non_blocking=True)
