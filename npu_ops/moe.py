"""Mixtures of experts: which experts, the rows sorted by expert, one grouped product, alone or joined with what follows
the first of a gated mlp, and the way back.

How many rows an expert has is known on the device alone, so that a graph can hold all of it.

Letters: T tokens, E experts, K experts a token, X in, Y out, R = T * K rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from npu_ops.contracts import check
from npu_ops.format import FRACTAL_NZ, cast_format
from npu_ops.linear import dynamic_quant
from npu_ops.moe_contracts import GATED_LIMIT, INNER_LIMIT, MOST_GROUPS
from npu_ops.quant_contracts import fills_fractals

# Numbers of the operators' modes, as their documentation has them.
CUMULATED, COUNTS, EACH_ROW, SOFTMAX, SIGMOID, BEST, BEST_TWO, PLAIN, PER_TOKEN = 0, 1, 0, 0, 1, 0, 1, -1, 1


def gating(*, logits_TE: Tensor, k: int, bias_E: Tensor | None = None, k_group: int = 1, group_count: int = 1,
           group_select_mode: int = BEST, norm_type: int = SOFTMAX,
           routed_scaling_factor: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """The k best experts out of the `k_group` best groups: weights [T, k], ids int32 [T, k], and the scores of all
    float32 [T, E], which the choice adds the bias to.

    Weights are scores, divided by their sum with SIGMOID and never with SOFTMAX, times `routed_scaling_factor`.
    """
    arguments: dict[str, Any] = {
        "x": logits_TE, "k": k, "bias": bias_E, "k_group": k_group, "group_count": group_count,
        "group_select_mode": group_select_mode, "renorm": 0, "norm_type": norm_type, "out_flag": True,
        "routed_scaling_factor": routed_scaling_factor,
    }  # fmt: skip
    check("npu_moe_gating_top_k", **arguments)
    weights_TK, ids_TK, scores_TE = torch.ops.npu.npu_moe_gating_top_k(**arguments)
    return weights_TK, ids_TK, scores_TE


@dataclass(frozen=True, slots=True)
class RowOrder:
    """row_of_R: where the row of token t and choice k went, at t * K + k, int32. counts_E: rows of each expert, int64;
    theirs lie one expert after the other."""

    row_of_R: Tensor
    counts_E: Tensor


def init_routing(*, x_TX: Tensor, ids_TK: Tensor, num_experts: int,
                 quant_mode: int = PLAIN) -> tuple[Tensor, Tensor, RowOrder]:
    """A row for each token and each of its experts, in the order of the experts: [R, X], their scales, the order.

    PER_TOKEN: the rows are int8 codes, as of `dynamic_quant`, and the scales float32 [R]; PLAIN: scales mean nothing.
    """
    arguments: dict[str, Any] = {
        "x": x_TX, "expert_idx": ids_TK, "active_num": ids_TK.numel(), "expert_num": num_experts, "drop_pad_mode": 0,
        "expert_tokens_num_type": COUNTS, "expert_tokens_num_flag": True, "active_expert_range": [0, num_experts],
        "quant_mode": quant_mode, "row_idx_type": EACH_ROW,
    }  # fmt: skip
    check("npu_moe_init_routing_v2", **arguments)
    rows_RX, row_of_R, counts_E, scale_R = torch.ops.npu.npu_moe_init_routing_v2(**arguments)
    return rows_RX, scale_R, RowOrder(row_of_R, counts_E)


@dataclass(frozen=True, slots=True)
class StackedExperts:
    """The weights of a layer's experts. weight_EXY: plain; or int8, in FRACTAL_NZ where activations are codes too
    (`rounds_inputs`) and it fills tiles. scale_EY: of int8. offset_EY: zeros, which int8 beside plain numbers wants.
    is_joined: they are for `swiglu_quant`, and not for `grouped_linear`.
    """

    weight_EXY: Tensor
    scale_EY: Tensor | None = None
    offset_EY: Tensor | None = None
    is_joined: bool = False

    @property
    def rounds_inputs(self) -> bool:
        return self.scale_EY is not None and self.offset_EY is None

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.weight_EXY, self.scale_EY, self.offset_EY) if t is not None)


@dataclass(frozen=True, slots=True)
class CodedRows:
    """Rows as int8 codes, [R, X], and the float32 scale of each, [R]. dtype: of the numbers they stand for, and of what
    is computed of them."""

    codes_RX: Tensor
    scale_R: Tensor
    dtype: torch.dtype


def stack(weights: list[Tensor], scales: list[Tensor], *, dtype: torch.dtype, rounds_inputs: bool = False,
          is_gated: bool = False) -> StackedExperts:
    """weights: [X, Y] of each expert; the list is emptied. scales: float32 [Y] of each, or none. dtype: of results, as
    which the scales are kept where the product wants that. is_gated: for `swiglu_quant`, if it takes them.
    """
    num_inputs, num_outputs = weights[0].shape
    if len(weights) > MOST_GROUPS or max(num_inputs, num_outputs) >= INNER_LIMIT:
        raise ValueError(f"products of experts on an NPU take up to {MOST_GROUPS} experts, and fewer than "
                         f"{INNER_LIMIT} inputs and outputs, not {len(weights)} of {num_inputs} and {num_outputs}")
    weight_EXY = torch.stack(weights)
    weights.clear()
    if not scales:
        return StackedExperts(weight_EXY)
    scale_EY = torch.stack(scales)
    if not rounds_inputs:
        scale_EY = scale_EY.to(dtype)
        return StackedExperts(weight_EXY, scale_EY, torch.zeros_like(scale_EY))
    is_tiled = fills_fractals(weight_EXY.shape, 1)
    if is_tiled:
        weight_EXY = cast_format(x=weight_EXY, acl_format=FRACTAL_NZ)
    is_joined = is_gated and is_tiled and num_outputs <= GATED_LIMIT
    keeps_scale = is_joined or dtype is torch.float16
    return StackedExperts(weight_EXY, scale_EY if keeps_scale else scale_EY.to(dtype), is_joined=is_joined)


def grouped_linear(*, x_RX: Tensor, scale_R: Tensor | None, experts: StackedExperts, counts_E: Tensor,
                   dtype: torch.dtype) -> Tensor:
    """Each expert's rows times its weight: [R, Y] in `dtype`. Rows are codes with a scale, or numbers that become codes
    here where the experts want them."""
    if not experts.rounds_inputs:
        return grouped_matmul(x_RX=x_RX, weight_EXY=experts.weight_EXY, counts_E=counts_E,
                              antiquant_scale_EY=experts.scale_EY, antiquant_offset_EY=experts.offset_EY)
    if scale_R is None:
        x_RX, scale_R = dynamic_quant(x=x_RX)
    return grouped_matmul(x_RX=x_RX, weight_EXY=experts.weight_EXY, counts_E=counts_E, scale_EY=experts.scale_EY,
                          row_scale_R=scale_R, output_dtype=dtype)


def swiglu_quant(*, x_RX: Tensor, scale_R: Tensor, experts: StackedExperts,
                 counts_E: Tensor) -> tuple[Tensor, Tensor]:
    """silu(first half) * second half of each expert's product, as codes and scales: int8 [R, Y / 2] and float32 [R].
    x_RX, scale_R: codes and scales. What is between the three is float32 throughout."""
    tensors = {"x": x_RX, "x_scale": scale_R, "group_list": counts_E}
    kind = _kind_of(counts_E)
    check("npu_grouped_matmul_swiglu_quant_v2", weight=experts.weight_EXY, weight_scale=experts.scale_EY,
          group_list_type=kind, **tensors)
    codes_RF, scale_R = torch.ops.npu.npu_grouped_matmul_swiglu_quant_v2(
        weight=[experts.weight_EXY], weight_scale=[experts.scale_EY], group_list_type=kind, **tensors)
    return codes_RF, scale_R


def _kind_of(counts_E: Tensor) -> int:
    """The documentation of the grouped product wants more than one entry of counts; of one group they are the running
    sum as well."""
    return COUNTS if len(counts_E) > 1 else CUMULATED


def grouped_matmul(*, x_RX: Tensor, weight_EXY: Tensor, counts_E: Tensor, scale_EY: Tensor | None = None,
                   row_scale_R: Tensor | None = None, antiquant_scale_EY: Tensor | None = None,
                   antiquant_offset_EY: Tensor | None = None, output_dtype: torch.dtype | None = None) -> Tensor:
    """Each expert's rows times its weight: [R, Y]. int8 by int8: with scales of the weights and of the rows. Others by
    int8: (weight + offset) * scale, of the rows' dtype."""
    options: dict[str, Any] = {
        "split_item": 2, "group_type": 0, "group_list": counts_E, "output_dtype": output_dtype,
        "group_list_type": _kind_of(counts_E)}
    tensors = {"scale": scale_EY, "per_token_scale": row_scale_R, "antiquant_scale": antiquant_scale_EY,
               "antiquant_offset": antiquant_offset_EY}
    check("npu_grouped_matmul", x=x_RX, weight=weight_EXY, **tensors, **options)
    options.update({name: [tensor] for name, tensor in tensors.items() if tensor is not None})
    out: Tensor = torch.ops.npu.npu_grouped_matmul([x_RX], [weight_EXY], **options)[0]
    return out


def unpermute(*, x_RX: Tensor, row_of_R: Tensor, weights_TK: Tensor) -> Tensor:
    """Each token's weighted sum over its experts: [T, X]."""
    check("npu_moe_token_unpermute", permuted_tokens=x_RX, sorted_indices=row_of_R, probs=weights_TK)
    out: Tensor = torch.ops.npu.npu_moe_token_unpermute(x_RX, row_of_R, probs=weights_TK)
    return out
