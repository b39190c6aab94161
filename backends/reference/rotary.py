"""Rotary embedding (Su et al. 2021) fused with the split of q, k, v and the cache write, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from backends.metadata import AttentionMetadata
from backends.reference.kv import write_kv
from backends.reference.norm import rms_norm


def rotate(x_TXH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
    """Rotate the pairs (x[i], x[i + H/2]) of every head; cos and sin are [T, H/2] in fp32."""
    first, second = x_TXH.float().chunk(2, dim=-1)
    cos, sin = cos_TH[:, None, :], sin_TH[:, None, :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_TXH.dtype)


def qkv_rope_write(
    qkv_TX: Tensor,
    positions_T: Tensor,
    cos_sin_LH: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    meta: AttentionMetadata,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    q_norm_H: Tensor | None = None,
    k_norm_H: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    heads_TXH = qkv_TX.view(len(qkv_TX), num_heads + 2 * num_kv_heads, head_dim)
    q_TNH, k_TKH, v_TKH = torch.split(heads_TXH, [num_heads, num_kv_heads, num_kv_heads], dim=1)
    if q_norm_H is not None:
        q_TNH = rms_norm(q_TNH, q_norm_H, eps)
    if k_norm_H is not None:
        k_TKH = rms_norm(k_TKH, k_norm_H, eps)
    cos_TH, sin_TH = cos_sin_LH[positions_T].chunk(2, dim=-1)
    write_kv(rotate(k_TKH, cos_TH, sin_TH), v_TKH, k_cache, v_cache, meta.slot_mapping_T)
    return rotate(q_TNH, cos_TH, sin_TH)
