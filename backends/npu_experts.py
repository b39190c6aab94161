"""The operators of mixtures of experts on an Ascend NPU, over `npu_ops/moe.py`: rows sorted by expert.

Letters: T tokens, E experts, K experts a token, R = T * K rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor

from backends.expert_choice import ExpertChoice, RouteRule
from backends.gated_experts import gated_by
from backends.reference import experts as reference
from backends.reference.experts import LEAST_SUM
from backends.reference.linear import quantize_rows
from backends.scaled_weight import ScaledWeight
from npu_ops import linear, moe
from npu_ops.activation import silu_mul
from npu_ops.moe import CodedRows, RowOrder, StackedExperts
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
    return _packed(experts, quantization, is_gated=False)


def pack_gated_experts(experts: Iterable[Tensor | ScaledWeight], *,
                       quantization: str | None = None) -> StackedExperts:
    """For the operator that joins product, activation and codes, where it takes them: W8A8 of certain shapes."""
    return _packed(experts, quantization, is_gated=True)


def _packed(experts: Iterable[Tensor | ScaledWeight], quantization: str | None, *, is_gated: bool) -> StackedExperts:
    """For a moment the experts of the layer are there twice: how many they are is known at the end."""
    linear.check_quantization(quantization)
    weights, scales, dtype = [], [], torch.float32
    for weight_YX in experts:
        if isinstance(weight_YX, ScaledWeight):
            raise ValueError("products on an NPU take no fp8")
        numbers_YX, dtype = weight_YX, weight_YX.dtype
        if quantization is not None:
            numbers_YX, scale_Y = quantize_rows(weight_YX, quantization)
            scales.append(scale_Y)
        weights.append(numbers_YX.t().contiguous())
    return moe.stack(weights, scales, dtype=dtype, rounds_inputs=quantization == "w8a8", is_gated=is_gated)


def gated_grouped_linear(x_TX: Tensor, packed: StackedExperts, choice: ExpertChoice, *, room: Tensor | None = None,
                         out: Tensor | None = None) -> Tensor | CodedRows:
    if not packed.is_joined or not len(x_TX):
        return _by_two(x_TX, packed, choice, room=room, out=out)
    codes_RX, scale_R = _sorted(x_TX, packed, choice)
    counts_E = choice.order.counts_E
    return CodedRows(*moe.swiglu_quant(x_RX=codes_RX, scale_R=scale_R, experts=packed, counts_E=counts_E), x_TX.dtype)


def _sorted(x_TX: Tensor, packed: StackedExperts, choice: ExpertChoice) -> tuple[Tensor, Tensor]:
    """The tokens' rows in the order of the experts, which is the choice's from now on, as codes where the experts want
    them; and their scales."""
    x_RX, scale_R, choice.order = moe.init_routing(
        x_TX=x_TX.contiguous(), ids_TK=choice.ids_TK, num_experts=len(packed.weight_EXY),
        quant_mode=moe.PER_TOKEN if packed.rounds_inputs else moe.PLAIN)
    return x_RX, scale_R


def grouped_linear(x: Tensor | CodedRows, packed: StackedExperts, choice: ExpertChoice, *, from_tokens: bool,
                   out: Tensor | None = None) -> Tensor:
    num_experts, _, num_outputs = packed.weight_EXY.shape
    if not len(choice.ids_TK):
        return choice.weights_TK.new_empty((0, num_outputs), dtype=x.dtype) if out is None else out
    dtype, scale_R = x.dtype, None
    if isinstance(x, CodedRows):
        scale_R, x = x.scale_R, x.codes_RX
    elif from_tokens:
        x, scales = _sorted(x, packed, choice)
        scale_R = scales if packed.rounds_inputs else None
    if choice.order is None:
        choice.order = row_order(choice, num_experts)
    y_RY = moe.grouped_linear(x_RX=x, scale_R=scale_R, experts=packed, counts_E=choice.order.counts_E, dtype=dtype)
    return y_RY if out is None else out.copy_(y_RY)


_by_two = gated_by(grouped_linear, silu_mul)


def row_order(choice: ExpertChoice, num_experts: int) -> RowOrder:
    """That of `grouped_linear`; the weights take the part of the rows."""
    return moe.init_routing(x_TX=choice.weights_TK, ids_TK=choice.ids_TK, num_experts=num_experts)[2]


def combine(y_RX: Tensor, choice: ExpertChoice, *, out: Tensor | None = None) -> Tensor:
    if not len(choice.ids_TK):
        return y_RX.new_empty((0, y_RX.shape[1])) if out is None else out
    order = row_order(choice, MOST_GROUPS) if choice.order is None else choice.order
    total_TX = moe.unpermute(x_RX=y_RX, row_of_R=order.row_of_R, weights_TK=choice.weights_TK)
    return total_TX if out is None else out.copy_(total_TX)
