"""Mixtures of experts, in plain torch: rows stay in the order of their tokens.

Letters: T tokens, E experts, K experts a token, G groups of experts, R = T * K rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from backends.expert_choice import ExpertChoice, RouteRule
from backends.reference.linear import linear, pack_linear
from backends.scaled_weight import ScaledWeight

LEAST_SUM = 1e-20  # added to a sum of weights; as in transformers' DeepSeek-V3


class PackedExperts:
    """The weights of a layer's experts, each packed for itself."""

    __slots__ = ("experts", "nbytes", "num_outputs")

    def __init__(self, experts: list[Any], num_outputs: int):
        self.experts, self.num_outputs = experts, num_outputs
        self.nbytes = sum(expert.nbytes for expert in experts)


def best(scores_TX: Tensor, count: int) -> Tensor:
    """The places of the largest numbers of each row, the largest first, the first of equals first: int64 [T, count]."""
    return scores_TX.sort(dim=1, descending=True, stable=True).indices[:, :count]


def route(logits_TE: Tensor, rule: RouteRule, bias_E: Tensor | None = None) -> ExpertChoice:
    logits_TE = logits_TE.float()
    scores_TE = logits_TE.sigmoid() if rule.sigmoid else logits_TE.softmax(dim=1)
    wanted_TE = scores_TE if bias_E is None else scores_TE + bias_E.float()
    if rule.num_groups > 1:
        wanted_TE = within_best_groups(wanted_TE, rule)
    ids_TK = best(wanted_TE, rule.num_chosen)
    weights_TK = scores_TE.gather(1, ids_TK)
    if rule.renormalise:
        weights_TK = weights_TK / (weights_TK.sum(dim=1, keepdim=True) + LEAST_SUM)
    is_wrong_T1 = scores_TE.isnan().any(dim=1, keepdim=True)
    weights_TK = torch.where(is_wrong_T1, float("nan"), weights_TK * rule.scale)
    return ExpertChoice(ids_TK.to(torch.int32), weights_TK)


def within_best_groups(wanted_TE: Tensor, rule: RouteRule) -> Tensor:
    """-inf for the experts of all other groups."""
    wanted_TGX = wanted_TE.unflatten(1, (rule.num_groups, -1))
    merit_TG = wanted_TGX.sort(dim=2, descending=True).values[:, :, :rule.summed_per_group].sum(dim=2)
    kept_TG = torch.zeros_like(merit_TG, dtype=torch.bool).scatter_(1, best(merit_TG, rule.num_kept_groups), True)
    return torch.where(kept_TG[:, :, None], wanted_TGX, float("-inf")).flatten(1)


def pack_experts(experts: Iterable[Tensor | ScaledWeight], *, quantization: str | None = None) -> PackedExperts:
    packed, num_outputs = [], 0
    for weight_YX in experts:
        packed.append(pack_linear(weight_YX, quantization=quantization))
        num_outputs = len(weight_YX)
    return PackedExperts(packed, num_outputs)


def grouped_linear(x: Tensor, packed: Any, choice: ExpertChoice, *, from_tokens: bool,
                   out: Tensor | None = None) -> Tensor:
    num_chosen = choice.ids_TK.shape[1]
    x_RX = x.repeat_interleave(num_chosen, dim=0) if from_tokens else x
    y_RY = x_RX.new_empty((len(x_RX), packed.num_outputs)) if out is None else out
    for expert, weight in enumerate(packed.experts):
        rows = choice.ids_TK.flatten() == expert
        y_RY[rows] = linear(x_RX[rows], weight)
    return y_RY


def combine(y_RX: Tensor, choice: ExpertChoice, *, out: Tensor | None = None) -> Tensor:
    total_TX = weighted_sum(y_RX.unflatten(0, choice.ids_TK.shape), choice.weights_TK)
    return total_TX.to(y_RX.dtype) if out is None else out.copy_(total_TX)


def weighted_sum(y_TKX: Tensor, weights_TK: Tensor) -> Tensor:
    """fp32, one expert after the other."""
    total_TX = torch.zeros_like(y_TKX[:, 0], dtype=torch.float32)
    for k in range(weights_TK.shape[1]):
        total_TX += y_TKX[:, k].float() * weights_TK[:, k, None]
    return total_TX
