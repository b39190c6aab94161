"""The operators of mixtures of experts on an Ascend NPU, over `npu_ops/moe.py`: rows sorted by expert.

Letters: T tokens, E experts, K experts a token, R = T * K rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor

from backends.expert_choice import ExpertChoice, RouteRule
from backends.reference import experts as reference
from backends.reference.experts import LEAST_SUM
from backends.reference.linear import quantize_rows
from backends.scaled_weight import ScaledWeight
from npu_ops import linear, moe
from npu_ops.moe import RowOrder, StackedExperts
from npu_ops.moe_contracts import MOST_GROUPS, takes_groups


@cache
def gating_knows(rule: RouteRule, num_experts: int) -> bool:
    """Whether `npu_moe_gating_top_k` chooses as the rule says: it takes groups of more than 2 experts, and measures a
    group by its best one or its best two."""
    return takes_groups(num_experts, rule.num_groups) and (rule.num_groups == 1 or rule.summed_per_group <= 2)


def route(logits_TE: Tensor, rule: RouteRule, bias_E: Tensor | None = None) -> ExpertChoice:
    num_tokens, num_experts = logits_TE.shape
    if num_experts == 1:
        return _only_one(logits_TE, rule)
    if num_tokens and gating_knows(rule, num_experts):
        return _by_gating(logits_TE.float().contiguous(), rule, None if bias_E is None else bias_E.float())
    return reference.route(logits_TE, rule, bias_E)  # plain torch, on the device


def _only_one(logits_T1: Tensor, rule: RouteRule) -> ExpertChoice:
    """Nothing to choose, as of the gate of a shared expert."""
    logits_T1 = logits_T1.float()
    weights_T1 = logits_T1.sigmoid() if rule.sigmoid else logits_T1.softmax(dim=1)
    if rule.renormalise:
        weights_T1 = weights_T1 / (weights_T1 + LEAST_SUM)
    return ExpertChoice(torch.zeros_like(weights_T1, dtype=torch.int32), _scaled(weights_T1, rule))


def _by_gating(logits_TE: Tensor, rule: RouteRule, bias_E: Tensor | None) -> ExpertChoice:
    """By one operator. It computes in fp32 and rounds the weights to its input's dtype, so that this is fp32. It sorts
    on the vector cores, which take the smaller id of equals first."""
    scales_itself = rule.sigmoid == rule.renormalise
    weights_TK, ids_TK, scores_TE = moe.gating(
        logits_TE=logits_TE, k=rule.num_chosen, bias_E=bias_E, k_group=rule.num_kept_groups,
        group_count=rule.num_groups, group_select_mode=moe.BEST if rule.summed_per_group == 1 else moe.BEST_TWO,
        norm_type=moe.SIGMOID if rule.sigmoid else moe.SOFTMAX,
        routed_scaling_factor=rule.scale if scales_itself else 1.0)
    # What it chooses among NaN is not documented, and an expert that does not exist would be a fault for all tokens.
    is_wrong_T1 = scores_TE.isnan().any(dim=1, keepdim=True)
    first_K = torch.arange(rule.num_chosen, dtype=torch.int32, device=ids_TK.device)
    ids_TK = torch.where(is_wrong_T1, first_K, ids_TK)
    # It divides sigmoids by their sum, always, and the results of softmax never.
    if rule.renormalise and not rule.sigmoid:
        weights_TK = _scaled(weights_TK / (weights_TK.sum(dim=1, keepdim=True) + LEAST_SUM), rule)
    elif rule.sigmoid and not rule.renormalise:
        weights_TK = _scaled(scores_TE.gather(1, ids_TK.long()), rule)
    return ExpertChoice(ids_TK, weights_TK.masked_fill(is_wrong_T1, float("nan")))


def _scaled(weights_TK: Tensor, rule: RouteRule) -> Tensor:
    return weights_TK if rule.scale == 1.0 else weights_TK * rule.scale


def pack_experts(experts: Iterable[Tensor | ScaledWeight], *, quantization: str | None = None) -> StackedExperts:
    """For a moment the experts of the layer are there twice: how many they are is known at the end."""
    linear.check_quantization(quantization)
    weights, scales, rounds_inputs = [], [], quantization == "w8a8"
    for weight_YX in experts:
        if isinstance(weight_YX, ScaledWeight):
            raise ValueError("products on an NPU take no fp8")
        numbers_YX = weight_YX
        if quantization is not None:
            numbers_YX, scale_Y = quantize_rows(weight_YX, quantization)
            scales.append(scale_Y.to(moe.scale_dtype(weight_YX.dtype, rounds_inputs=rounds_inputs)))
        weights.append(numbers_YX.t().contiguous())
    return moe.stack(weights, scales, rounds_inputs=rounds_inputs)


def grouped_linear(x: Tensor, packed: StackedExperts, choice: ExpertChoice, *, from_tokens: bool,
                   out: Tensor | None = None) -> Tensor:
    num_experts, _, num_outputs = packed.weight_EXY.shape
    if not len(choice.ids_TK):
        return x.new_empty((0, num_outputs)) if out is None else out
    scale_R, dtype = None, x.dtype
    if from_tokens:
        quant_mode = moe.PER_TOKEN if packed.rounds_inputs else moe.PLAIN
        x, scales, choice.order = moe.init_routing(x_TX=x.contiguous(), ids_TK=choice.ids_TK, num_experts=num_experts,
                                                   quant_mode=quant_mode)
        scale_R = scales if packed.rounds_inputs else None
    elif choice.order is None:
        choice.order = row_order(choice, num_experts)
    y_RY = moe.grouped_linear(x_RX=x, scale_R=scale_R, experts=packed, counts_E=choice.order.counts_E, dtype=dtype)
    return y_RY if out is None else out.copy_(y_RY)


def row_order(choice: ExpertChoice, num_experts: int) -> RowOrder:
    """That of `grouped_linear`; the weights take the part of the rows."""
    return moe.init_routing(x_TX=choice.weights_TK, ids_TK=choice.ids_TK, num_experts=num_experts)[2]


def combine(y_RX: Tensor, choice: ExpertChoice, *, out: Tensor | None = None) -> Tensor:
    if not len(choice.ids_TK):
        return y_RX.new_empty((0, y_RX.shape[1])) if out is None else out
    order = row_order(choice, MOST_GROUPS) if choice.order is None else choice.order
    total_TX = moe.unpermute(x_RX=y_RX, row_of_R=order.row_of_R, weights_TK=choice.weights_TK)
    return total_TX if out is None else out.copy_(total_TX)
