"""The layout of the CPU's KV cache, and the ops that move its contents.

The layout, for the reference and the cpu set alike; nothing else states or assumes it:

    K  [B, K, H, P]   a block holds the keys of one kv head *transposed*: P positions are adjacent,
                      so that the scores of P positions are H multiply-adds of whole vectors.
    V  [B, K, P, H]   a value's H numbers are adjacent: the weighted sum runs over whole vectors.

Both are allocated as [B, K, P, H] (`Backend.kv_cache_shape` has one shape for both) and
`keys_BKHP` views the K cache in its true order. A layer with one part, of latents, has it as V lies, with one head:
[B, 1, P, L + R]. A quantised cache (`kv_codes.py`) has its codes in these orders.
"""

from __future__ import annotations

import torch
from torch import Tensor

from backends.metadata import AttentionMetadata
from backends.reference.kv_codes import QUANTISED, dequantise, quantise, row_width, split_tiles


def cache_shape(num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int) -> tuple[int, int, int, int]:
    return (num_blocks, num_kv_heads, block_size, head_dim)


def keys_BKHP(k_cache: Tensor) -> Tensor:
    """The K cache, allocated with `cache_shape`, as [B, K, H, P]; shares its memory."""
    num_blocks, num_kv_heads, block_size, head_dim = k_cache.shape
    return k_cache.view(num_blocks, num_kv_heads, head_dim, block_size)


def write_kv(k_TKH: Tensor, v_TKH: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping_T: Tensor) -> None:
    """Store the keys and values of T tokens at their slots; -1: not stored."""
    block_size = v_cache.shape[2]
    written = slot_mapping_T >= 0
    slots = slot_mapping_T[written].long()
    blocks, offsets = slots // block_size, slots % block_size
    k_TKH, v_TKH = k_TKH[written], v_TKH[written]
    if v_cache.dtype in QUANTISED:
        _write_codes(k_TKH, k_cache, blocks, offsets, keys=True)
        _write_codes(v_TKH, v_cache, blocks, offsets, keys=False)
        return
    keys_BKHP(k_cache)[blocks, :, :, offsets] = k_TKH.to(k_cache.dtype)
    v_cache[blocks, :, offsets, :] = v_TKH.to(v_cache.dtype)


def write_latents(latent_TX: Tensor, cache: Tensor, slot_mapping_T: Tensor) -> None:
    """Store what a layer of latents keeps of T tokens at their slots; -1: not stored."""
    block_size = cache.shape[2]
    written = slot_mapping_T >= 0
    slots = slot_mapping_T[written].long()
    blocks, offsets = slots // block_size, slots % block_size
    if cache.dtype in QUANTISED:
        _write_codes(latent_TX[written, None], cache, blocks, offsets, keys=False)
        return
    cache[blocks, 0, offsets] = latent_TX[written].to(cache.dtype)


def _write_codes(x_TKH: Tensor, cache: Tensor, blocks_T: Tensor, offsets_T: Tensor, *, keys: bool) -> None:
    num_kv_heads, head_dim = x_TKH.shape[1:]
    codes, scales_BKP = split_tiles(cache)
    codes_TKH, scales_TK1 = quantise(x_TKH, QUANTISED[cache.dtype], dim=2)
    order = (head_dim, -1) if keys else (-1, head_dim)
    codes = codes.view(len(cache), num_kv_heads, *order)
    (codes if keys else codes.transpose(2, 3))[blocks_T, :, :, offsets_T] = codes_TKH.view(torch.uint8)
    scales_BKP[blocks_T, :, offsets_T] = scales_TK1[..., 0]


def gather_kv(
    k_cache: Tensor, v_cache: Tensor, block_ids_M: Tensor, seq_len: int
) -> tuple[Tensor, Tensor]:
    """Keys and values of one sequence in order: two tensors [K, seq_len, H], fp32 from a quantised cache. Reads no
    further block."""
    block_size = v_cache.shape[2]
    return _in_order(k_cache, v_cache, block_ids_M[: -(-seq_len // block_size)].long(), seq_len)


def slice_kv(k_cache: Tensor, v_cache: Tensor, first_block: int, seq_len: int) -> tuple[Tensor, Tensor]:
    """`gather_kv` of a sequence whose blocks follow each other from `first_block` on: views, nothing is looked up."""
    return _in_order(k_cache, v_cache, slice(first_block, first_block - (-seq_len // v_cache.shape[2])), seq_len)


def latents_of(cache: Tensor, meta: AttentionMetadata, s: int, seq_len: int) -> Tensor:
    """What a layer of latents keeps of sequence s, in order: [seq_len, L + R], fp32 from a quantised cache. Reads no
    further block; a view where blocks follow each other without a gap."""
    num_blocks = -(-seq_len // cache.shape[2])
    blocks: Tensor | slice
    if meta.kv_base_S is None:
        blocks = meta.block_table_SM[s, :num_blocks].long()
    else:
        first: int = meta.kv_base_S.tolist()[s]  # which a captured step may do, for the CPU
        blocks = slice(first, first + num_blocks)
    found = _decoded(cache, blocks, False) if cache.dtype in QUANTISED else cache[blocks]
    return found[:, 0].flatten(0, 1)[:seq_len]


def latent_width(cache: Tensor) -> int:
    """L + R: how many numbers a layer of latents keeps of a token."""
    return cache.shape[3] - row_width(0, cache.dtype)


def _in_order(k_cache: Tensor, v_cache: Tensor, blocks: Tensor | slice, seq_len: int) -> tuple[Tensor, Tensor]:
    """These blocks of one sequence as [K, seq_len, H]."""
    if v_cache.dtype in QUANTISED:
        keys_MKHP, values_MKPH = _decoded(k_cache, blocks, True), _decoded(v_cache, blocks, False)
    else:
        keys_MKHP, values_MKPH = keys_BKHP(k_cache)[blocks], v_cache[blocks]
    num_kv_heads, head_dim = keys_MKHP.shape[1:3]
    keys = keys_MKHP.permute(1, 0, 3, 2).reshape(num_kv_heads, -1, head_dim)
    values = values_MKPH.permute(1, 0, 2, 3).reshape(num_kv_heads, -1, head_dim)
    return keys[:, :seq_len], values[:, :seq_len]


def _decoded(cache: Tensor, blocks: Tensor | slice, keys: bool) -> Tensor:
    """Blocks of a quantised cache in fp32: [M, K, H, P] of keys, [M, K, P, H] of values."""
    codes, scales_MKP = (part[blocks] for part in split_tiles(cache))
    num_blocks, num_kv_heads, block_size = scales_MKP.shape
    shape = (num_blocks, num_kv_heads, -1, block_size) if keys else (num_blocks, num_kv_heads, block_size, -1)
    codes = codes.contiguous().view(cache.dtype).view(shape)
    return dequantise(codes, scales_MKP.unsqueeze(2 if keys else 3), QUANTISED[cache.dtype])


def copy_blocks(cache: Tensor, src_B: Tensor, dst_B: Tensor) -> None:
    if cache.dtype in QUANTISED:
        cache = cache.view(torch.uint8)  # not every op knows fp8
    cache[dst_B] = cache[src_B]
