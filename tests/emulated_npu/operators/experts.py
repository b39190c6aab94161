"""Routing of a mixture of experts. T tokens, K experts a token, E experts, H hidden."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.emulated_npu.operators.quantised import quantised
from tests.emulated_npu.operators.registry import emulates, refuse


@emulates("npu::npu_moe_gating_top_k_softmax")
def gating_top_k_softmax(x: Tensor, finished: Tensor | None = None, k: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """(weights, experts, row numbers column by column), each (T, K); finished tokens go to expert E."""
    weights, experts = x.float().softmax(-1).topk(k, -1)
    if finished is not None:
        experts = experts.masked_fill(finished[:, None], x.shape[-1])
    rows = torch.arange(experts.numel(), dtype=torch.int32).view(k, -1).T.contiguous()
    return weights.to(x.dtype), experts.int(), rows


@emulates("npu::npu_moe_gating_top_k")
def gating_top_k(
    x: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    input_ids: Tensor | None = None,
    tid2eid: Tensor | None = None,
    k_group: int = 1,
    group_count: int = 1,
    group_select_mode: int = 0,
    renorm: int = 0,
    norm_type: int = 0,
    out_flag: bool = False,
    routed_scaling_factor: float = 1.0,
    eps: float = 1e-20,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores by softmax (0) or sigmoid (1); the bias and the groups take part in the choice only.

    What is chosen among scores that are not numbers is not documented: experts that do not exist, here.
    """
    name = "npu_moe_gating_top_k"
    refuse(name, {"input_ids": input_ids, "tid2eid": tid2eid, "renorm": renorm}, (None, 0))
    num_experts = x.shape[-1]
    size, rest = divmod(num_experts, group_count)
    is_too_wide = num_experts > 2048 or -(-size // 32) * 32 * group_count > 2048
    if is_too_wide or rest or size <= 2 or not 1 <= k_group <= group_count or not 1 <= k <= size * k_group:
        raise RuntimeError(f"{name}: k {k} of {num_experts} experts in {group_count} groups, {k_group} chosen")
    if not x.numel():
        raise RuntimeError(f"{name}: x is empty")
    if bias is not None and bias.dtype != x.dtype:
        raise RuntimeError(f"{name}: bias is {bias.dtype}, x {x.dtype}")
    scores = x.float().softmax(-1) if norm_type == 0 else x.float().sigmoid()
    choice = scores if bias is None else scores + bias.float()
    if group_count > 1:
        groups = choice.view(x.shape[0], group_count, -1)
        rank = groups.amax(-1) if group_select_mode == 0 else groups.topk(2, -1).values.sum(-1)
        kept = torch.zeros_like(rank, dtype=torch.bool).scatter_(1, rank.topk(k_group, -1).indices, True)
        choice = groups.masked_fill(~kept[..., None], float("-inf")).flatten(1)
    experts = choice.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    weights = scores.gather(1, experts)
    undefined = scores.isnan().any(-1, keepdim=True)
    experts, weights = experts.masked_fill(undefined, num_experts), weights.masked_fill(undefined, 0.0)
    if norm_type == 1:
        weights = weights / (weights.sum(-1, keepdim=True) + eps)
    return (weights * routed_scaling_factor).to(x.dtype), experts.int(), scores


@emulates("npu::npu_moe_init_routing_v2")
def init_routing_v2(
    x: Tensor,
    expert_idx: Tensor,
    *,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    active_num: int = -1,
    expert_capacity: int = -1,
    expert_num: int = -1,
    drop_pad_mode: int = 0,
    expert_tokens_num_type: int = 0,
    expert_tokens_num_flag: bool = False,
    quant_mode: int = -1,
    active_expert_range: Sequence[int] = (),
    row_idx_type: int = 0,
    x_dtype: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of x sorted by expert (T*K, H), where each of them went or came from, rows an expert, scales.

    What is beyond the last active row is undefined, and NaN here.
    """
    name = "npu_moe_init_routing_v2"
    refuse(name, {"offset": offset, "x_dtype": x_dtype, "drop_pad_mode": drop_pad_mode}, (None, 0))
    total = expert_idx.numel()
    if expert_idx.dtype is not torch.int32 or active_num not in (-1, 0, total):
        raise RuntimeError(f"{name}: expert_idx {expert_idx.dtype}, active_num {active_num} of {total}")
    if (
        not expert_tokens_num_flag
        or expert_tokens_num_type not in (1, 2)
        or quant_mode not in (-1, 1)
        or row_idx_type not in (0, 1)
    ):
        raise RuntimeError(f"{name}: needs expert_tokens_num_flag, expert_tokens_num_type 1 or 2, quant_mode -1 or 1")
    first, last = active_expert_range or (0, expert_num)
    flat = expert_idx.flatten().long()
    if total and (int(flat.min()) < 0 or int(flat.max()) >= expert_num):
        raise RuntimeError(f"{name}: experts are not all in [0, {expert_num})")
    active = (flat >= first) & (flat < last)
    order = torch.where(active, flat, expert_num).sort(dim=0, stable=True).indices[: int(active.sum())]
    came_from = order // expert_idx.shape[1]
    expanded = (
        torch.full((total, x.shape[1]), float("nan")).to(x.dtype)
        if quant_mode == -1
        else torch.zeros(total, x.shape[1], dtype=torch.int8)
    )
    scales = torch.full((total,), float("nan"))
    rows = x[came_from]
    if quant_mode == 1:
        smooth = scale.float()[flat[order] - first] if scale is not None else 1.0
        rows, scales[: order.numel()] = quantised(rows.float() * smooth)
    elif scale is not None:
        scales[: order.numel()] = scale[came_from]
    expanded[: order.numel()] = rows
    index = torch.full((total,), -1, dtype=torch.int32)
    if row_idx_type == 0:
        index[order] = torch.arange(order.numel(), dtype=torch.int32)
    else:
        index[: order.numel()] = order.int()
    counts = torch.bincount(flat[active], minlength=expert_num)
    return expanded, index, _token_counts(counts, first, last, expert_tokens_num_type), scales


def _token_counts(counts: Tensor, first: int, last: int, kind: int) -> Tensor:
    if kind == 1:
        return counts[first:last].clone()
    pairs = torch.zeros(counts.numel(), 2, dtype=torch.int64)
    used = counts.nonzero().flatten()
    pairs[: used.numel()] = torch.stack((used, counts[used]), 1)
    return pairs


@emulates("npu::npu_moe_token_permute")
def token_permute(
    tokens: Tensor, indices: Tensor, num_out_tokens: int | None = None, padded_mode: bool = False
) -> tuple[Tensor, Tensor]:
    """Rows sorted by expert, and for each (token, choice) the row that it went to."""
    refuse("npu_moe_token_permute", {"padded_mode": padded_mode}, (False,))
    flat = indices.flatten()
    order = flat.sort(dim=0, stable=True).indices
    top_k = indices.shape[1] if indices.dim() == 2 else 1
    went_to = torch.empty(flat.numel(), dtype=torch.int32)
    went_to[order] = torch.arange(flat.numel(), dtype=torch.int32)
    return tokens[order // top_k][: num_out_tokens or None], went_to


@emulates("npu::npu_moe_token_unpermute")
def token_unpermute(
    permuted_tokens: Tensor,
    sorted_indices: Tensor,
    probs: Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: Sequence[int] | None = None,
) -> Tensor:
    """out[t] = sum over j of probs[t, j] * permuted[sorted_indices[t * K + j]]"""
    refuse("npu_moe_token_unpermute", {"padded_mode": padded_mode}, (False,))
    where = sorted_indices.long()
    if where.numel() and (int(where.min()) < 0 or int(where.max()) >= permuted_tokens.shape[0]):
        raise RuntimeError(f"npu_moe_token_unpermute: sorted_indices are not all in [0, {permuted_tokens.shape[0]})")
    top_k = probs.shape[1] if probs is not None else 1
    rows = permuted_tokens[where].float().view(-1, top_k, permuted_tokens.shape[1])
    weighted = rows if probs is None else rows * probs.float()[..., None]
    return weighted.sum(1).to(permuted_tokens.dtype)


@emulates("npu::_npu_moe_token_unpermute")  # what the wheel's autograd kernel of the one above calls
def token_unpermute_for_autograd(
    permuted_tokens: Tensor,
    sorted_indices: Tensor,
    probs: Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    result = token_unpermute(permuted_tokens, sorted_indices, probs, padded_mode, restore_shape)
    return result, permuted_tokens
