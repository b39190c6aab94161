"""The fused attention operators, FIA v1 and v2, the decode attention of ATB, and what puts partial results together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.emulated_npu.operators.attention import Call, attend, attend_one, paged_keys
from tests.emulated_npu.operators.registry import emulates, refuse

NEUTRAL = (None, 0, False)


def _v1(query: Tensor, key: Tensor, value: Tensor, **given: Any) -> Call:
    taken = {name: given.pop(name, default) for name, default in _V1.items()}
    refuse("npu_fused_infer_attention_score", {k: v for k, v in given.items() if k != "inner_precise"}, NEUTRAL)
    return Call(query, key, value, *taken.values())


_V1: dict[str, Any] = {
    "atten_mask": None, "actual_seq_lengths": None, "actual_seq_lengths_kv": None, "block_table": None,
    "query_rope": None, "key_rope": None, "": None, "num_heads": 1, "num_key_value_heads": 0, "scale": 1.0,
    "pre_tokens": 2**31 - 1, "next_tokens": 2**31 - 1, "input_layout": "BSH", "sparse_mode": 0, "block_size": 0,
    "softmax_lse_flag": False,
}  # fmt: skip
_V2 = dict(
    zip(
        ("atten_mask", "actual_seq_qlen", "actual_seq_kvlen", "block_table", "query_rope", "key_rope", "learnable_sink",
         "num_query_heads", "num_key_value_heads", "softmax_scale", "pre_tokens", "next_tokens", "input_layout",
         "sparse_mode", "block_size", "return_softmax_lse"),
        _V1.values(), strict=True,
    )
)  # fmt: skip


def _v2(query: Tensor, key: Tensor, value: Tensor, **given: Any) -> Call:
    taken = {name: given.pop(name, default) for name, default in _V2.items()}
    refuse("npu_fused_infer_attention_score_v2", {k: v for k, v in given.items() if k != "inner_precise"}, NEUTRAL)
    return Call(query, key, value, *taken.values())


@emulates("npu::npu_fused_infer_attention_score")
def fused(query: Tensor, key: Tensor, value: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
    return attend(_v1(query, key, value, **given))


@emulates("npu::npu_fused_infer_attention_score_v2")
def fused_v2(query: Tensor, key: Tensor, value: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
    return attend(_v2(query, key, value, **given))


def _into(result: tuple[Tensor, Tensor], out: Sequence[Tensor], workspace: Tensor | None) -> tuple[Tensor, Tensor]:
    if workspace is not None and workspace.numel() == 0:
        raise RuntimeError("a workspace of no bytes")
    for given, made in zip(out, result, strict=True):
        if made.numel():
            if given.shape != made.shape or given.dtype != made.dtype:
                raise RuntimeError(
                    f"out is {given.dtype} {tuple(given.shape)}, the result {made.dtype} {tuple(made.shape)}"
                )
            given.copy_(made)
    return out[0], out[1]


@emulates("npu::npu_fused_infer_attention_score.out")
def fused_out(
    query: Tensor, key: Tensor, value: Tensor, *, workspace: Tensor | None = None, out: Sequence[Tensor], **given: Any
) -> tuple[Tensor, Tensor]:
    return _into(attend(_v1(query, key, value, **given)), out, workspace)


@emulates("npu::npu_fused_infer_attention_score_v2.out")
def fused_v2_out(
    query: Tensor, key: Tensor, value: Tensor, *, workspace: Tensor | None = None, out: Sequence[Tensor], **given: Any
) -> tuple[Tensor, Tensor]:
    return _into(attend(_v2(query, key, value, **given)), out, workspace)


@emulates("npu::_npu_fused_infer_attention_score_get_max_workspace", host_only=True)
def fused_workspace(query: Tensor, key: Tensor, value: Tensor, **given: Any) -> Tensor:
    _v1(query, key, value, **given)
    return torch.zeros(1024 * query.shape[0], dtype=torch.int8)


@emulates("npu::_npu_fused_infer_attention_score_v2_get_max_workspace", host_only=True)
def fused_v2_workspace(query: Tensor, key: Tensor, value: Tensor, **given: Any) -> Tensor:
    _v2(query, key, value, **given)
    return torch.zeros(1024 * query.shape[0], dtype=torch.int8)


@emulates("atb::_npu_paged_attention")
def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    num_kv_heads: int,
    num_heads: int,
    scale_value: float,
    block_table: Tensor,
    context_lens: Tensor,
    out: Tensor,
    *,
    workspace: Tensor | None = None,
) -> None:
    """Decode only: query (T, N, D), cache (blocks, size, K, D); `context_lens` is int32 on the host, as is right."""
    block_size = key_cache.shape[1]
    if block_size % 16 or block_size > 128 or query.shape[-1] > 256:
        raise RuntimeError(f"_npu_paged_attention: block_size {block_size}, head_size {query.shape[-1]}")
    if context_lens.dtype is not torch.int32 or out.shape != (*query.shape[:2], value_cache.shape[-1]):
        raise RuntimeError(f"_npu_paged_attention: context_lens {context_lens.dtype}, out {tuple(out.shape)}")
    call = Call(
        query, key_cache.flatten(2), value_cache.flatten(2), None, None, context_lens.tolist(), block_table,
        None, None, None, num_heads, num_kv_heads, scale_value, 0, 0, "BSND", 0, block_size, False,
    )  # fmt: skip
    for row in range(query.shape[0]):
        key, value = paged_keys(call, row, int(context_lens[row]))
        out[row] = attend_one(call, query[row : row + 1], key, value, row)[0][0]


@emulates("atb::_npu_paged_attention_get_workspace", host_only=True)
def paged_attention_workspace(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    num_kv_heads: int,
    num_heads: int,
    scale_value: float,
    block_table: Tensor,
    context_lens: Tensor,
    out: Tensor,
) -> Tensor:
    return torch.zeros(1024 * query.shape[0], dtype=torch.int8)


@emulates("npu::npu_attention_update")
def attention_update(lse: Sequence[Tensor], local_out: Sequence[Tensor], update_type: int) -> tuple[Tensor, Tensor]:
    """Partial results over parts of the keys, put together: lse (rows), local_out (rows, D)."""
    if update_type not in (0, 1) or any(each.dtype is not torch.float32 or each.dim() != 1 for each in lse):
        raise RuntimeError("npu_attention_update: lse is float32 of one dimension, update_type 0 or 1")
    parts = torch.stack(list(lse))
    total = parts.logsumexp(0)
    weights = torch.exp(parts - total)[..., None]
    out = (torch.stack([each.float() for each in local_out]) * weights).sum(0).to(local_out[0].dtype)
    return out, total  # of update_type 0 the document says that it is not valid, yet it has this shape
