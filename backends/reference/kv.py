"""The layout of the CPU's KV cache, and the ops that move its contents.

The layout, for the reference and the cpu set alike; nothing else states or assumes it:

    K  [B, K, H, P]   a block holds the keys of one kv head *transposed*: P positions are adjacent,
                      so that the scores of P positions are H multiply-adds of whole vectors.
    V  [B, K, P, H]   a value's H numbers are adjacent: the weighted sum runs over whole vectors.

Both are allocated as [B, K, P, H] (`Backend.kv_cache_shape` has one shape for both) and
`keys_BKHP` views the K cache in its true order.
"""

from __future__ import annotations

from torch import Tensor


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
    keys_BKHP(k_cache)[blocks, :, :, offsets] = k_TKH[written].to(k_cache.dtype)
    v_cache[blocks, :, offsets, :] = v_TKH[written].to(v_cache.dtype)


def gather_kv(
    k_cache: Tensor, v_cache: Tensor, block_ids_M: Tensor, seq_len: int
) -> tuple[Tensor, Tensor]:
    """Keys and values of one sequence in order: two tensors [K, seq_len, H]. Reads no further slot."""
    block_size = v_cache.shape[2]
    block_ids = block_ids_M[: -(-seq_len // block_size)].long()
    return _in_order(keys_BKHP(k_cache)[block_ids], v_cache[block_ids], seq_len)


def slice_kv(k_cache: Tensor, v_cache: Tensor, first_block: int, seq_len: int) -> tuple[Tensor, Tensor]:
    """`gather_kv` of a sequence whose blocks follow each other from `first_block` on: views, nothing is looked up."""
    blocks = slice(first_block, first_block - (-seq_len // v_cache.shape[2]))
    return _in_order(keys_BKHP(k_cache)[blocks], v_cache[blocks], seq_len)


def _in_order(keys_MKHP: Tensor, values_MKPH: Tensor, seq_len: int) -> tuple[Tensor, Tensor]:
    """The blocks of one sequence as [K, seq_len, H]."""
    num_kv_heads, head_dim = keys_MKHP.shape[1:3]
    keys = keys_MKHP.permute(1, 0, 3, 2).reshape(num_kv_heads, -1, head_dim)
    values = values_MKPH.permute(1, 0, 2, 3).reshape(num_kv_heads, -1, head_dim)
    return keys[:, :seq_len], values[:, :seq_len]


def copy_blocks(cache: Tensor, src_B: Tensor, dst_B: Tensor) -> None:
    cache[dst_B] = cache[src_B]
