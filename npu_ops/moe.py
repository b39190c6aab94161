"""Mixtures of experts: which experts, the rows sorted by expert, one grouped product, and the way back.

Letters: T tokens, E experts, k experts a token, D hidden, F ffn, R = T * k rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from npu_ops.activation import swiglu
from npu_ops.contracts import check

# Numbers of the operators' modes, as their documentation has them.
COUNTS, EACH_ROW, SOFTMAX, SIGMOID, BEST, BEST_TWO = 1, 0, 0, 1, 0, 1


def gating_softmax(*, logits_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Softmax over all experts, then the k largest: weights [T, k] in the logits' dtype, ids int32 [T, k]."""
    check("npu_moe_gating_top_k_softmax", x=logits_TE, k=k)
    weights_TK, ids_TK, _ = torch.ops.npu.npu_moe_gating_top_k_softmax(logits_TE, None, k)
    return weights_TK, ids_TK


def gating(*, logits_TE: Tensor, k: int, bias_E: Tensor | None = None, k_group: int = 1, group_count: int = 1,
           group_select_mode: int = BEST, norm_type: int = SOFTMAX,
           routed_scaling_factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """The k best experts out of the `k_group` best groups (DeepSeek-V3): weights [T, k], ids int32 [T, k]."""
    arguments: dict[str, Any] = {
        "x": logits_TE, "k": k, "bias": bias_E, "k_group": k_group, "group_count": group_count,
        "group_select_mode": group_select_mode, "renorm": 0, "norm_type": norm_type,
        "routed_scaling_factor": routed_scaling_factor,
    }  # fmt: skip
    check("npu_moe_gating_top_k", **arguments)
    weights_TK, ids_TK, _ = torch.ops.npu.npu_moe_gating_top_k(**arguments)
    return weights_TK, ids_TK


def init_routing(*, x_TD: Tensor, ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows in the order of their experts: (x [R, D], where each (token, choice) went int32 [R], rows of each expert
    int64 [E])."""
    arguments: dict[str, Any] = {
        "x": x_TD, "expert_idx": ids_TK, "active_num": ids_TK.numel(), "expert_num": num_experts, "drop_pad_mode": 0,
        "expert_tokens_num_type": COUNTS, "expert_tokens_num_flag": True, "active_expert_range": [0, num_experts],
        "quant_mode": -1, "row_idx_type": EACH_ROW,
    }  # fmt: skip
    check("npu_moe_init_routing_v2", **arguments)
    x_RD, row_of_R, counts_E, _ = torch.ops.npu.npu_moe_init_routing_v2(**arguments)
    return x_RD, row_of_R, counts_E


def grouped_matmul(*, x_RX: Tensor, weight_EXY: Tensor, counts_E: Tensor, scale_EY: Tensor | None = None,
                   row_scale_R: Tensor | None = None, output_dtype: torch.dtype | None = None) -> Tensor:
    """Each expert's rows times its weight: [R, Y]. int8: with scales of the weights and of the rows."""
    options: dict[str, Any] = {"split_item": 2, "group_type": 0, "group_list_type": COUNTS, "group_list": counts_E,
                               "output_dtype": output_dtype}
    check("npu_grouped_matmul", x=x_RX, weight=weight_EXY, scale=scale_EY, per_token_scale=row_scale_R, **options)
    if scale_EY is not None:
        options.update(scale=[scale_EY], per_token_scale=[row_scale_R])
    out: Tensor = torch.ops.npu.npu_grouped_matmul([x_RX], [weight_EXY], **options)[0]
    return out


def unpermute(*, x_RD: Tensor, row_of_R: Tensor, weights_TK: Tensor) -> Tensor:
    """Each token's weighted sum over its experts: [T, D]."""
    check("npu_moe_token_unpermute", permuted_tokens=x_RD, sorted_indices=row_of_R, probs=weights_TK)
    out: Tensor = torch.ops.npu.npu_moe_token_unpermute(x_RD, row_of_R, probs=weights_TK)
    return out


def experts(*, x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor, gate_up_EDF2: Tensor, down_EFD: Tensor) -> Tensor:
    """The feed-forward part of a mixture: [T, D]."""
    x_RD, row_of_R, counts_E = init_routing(x_TD=x_TD, ids_TK=ids_TK, num_experts=len(gate_up_EDF2))
    hidden_RF = swiglu(gate_up=grouped_matmul(x_RX=x_RD, weight_EXY=gate_up_EDF2, counts_E=counts_E))
    out_RD = grouped_matmul(x_RX=hidden_RF, weight_EXY=down_EFD, counts_E=counts_E)
    return unpermute(x_RD=out_RD, row_of_R=row_of_R, weights_TK=weights_TK)
