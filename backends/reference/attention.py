"""Paged causal attention in plain torch: one sequence at a time, all scores at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from backends.metadata import AttentionMetadata
from backends.reference.kv import gather_kv, slice_kv


def plan(meta: AttentionMetadata, *, num_heads: int, num_kv_heads: int, head_dim: int) -> Any:
    return None


def visible(query_len: int, seq_len: int, sliding_window: int | None, device: torch.device) -> Tensor:
    """Which positions each query sees: bool [query_len, seq_len]."""
    positions = torch.arange(seq_len, device=device)
    last = positions[seq_len - query_len :, None]
    seen = positions <= last
    return seen if sliding_window is None else seen & (positions > last - sliding_window)


def attend(q_QNH: Tensor, k_KCH: Tensor, v_KCH: Tensor, scale: float, seen_QC: Tensor) -> Tensor:
    """Attention of one sequence, [Q, N, H] -> [Q, N, the values' width]; scores and sums in fp32."""
    query_len, num_heads, head_dim = q_QNH.shape
    num_kv_heads = k_KCH.shape[0]
    q = q_QNH.float().view(query_len, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores = torch.einsum("qkgh,kch->kgqc", q, k_KCH.float()) * scale
    weights = torch.softmax(scores.masked_fill(~seen_QC, float("-inf")), dim=-1)
    out = torch.einsum("kgqc,kch->qkgh", weights, v_KCH.float())
    return out.reshape(query_len, num_heads, v_KCH.shape[2]).to(q_QNH.dtype)


def attention(
    q_TNH: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    meta: AttentionMetadata,
    *,
    scale: float,
    sliding_window: int | None = None,
) -> Tensor:
    out_TNH = torch.zeros_like(q_TNH)
    starts, seq_lens = meta.query_start_S1.tolist(), meta.seq_lens_S.tolist()
    bases = None if meta.kv_base_S is None else meta.kv_base_S.tolist()
    for s, seq_len in enumerate(seq_lens):
        begin, end = starts[s], starts[s + 1]
        if bases is None:
            keys, values = gather_kv(k_cache, v_cache, meta.block_table_SM[s], seq_len)
        else:
            keys, values = slice_kv(k_cache, v_cache, bases[s], seq_len)
        seen = visible(end - begin, seq_len, sliding_window, q_TNH.device)
        out_TNH[begin:end] = attend(q_TNH[begin:end], keys, values, scale, seen)
    return out_TNH.flatten(1)
