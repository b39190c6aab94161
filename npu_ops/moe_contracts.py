"""The contracts of the operators of mixtures of experts: gating, routing, grouped products, and the way back."""

from __future__ import annotations

from typing import Any

import torch

from npu_ops.contract import FLOATS, Contract, Rule, contiguous, dtypes, on_one_device, one_of, ranks, same_dtype
from npu_ops.quant_contracts import FRACTAL_NZ, fills_fractals

DOC = "torch_npu operator docs"
INNER_LIMIT = 65536  # of the inner axis of a grouped product, as its documentation has it
MOST_GROUPS = 1024  # of a grouped product
GATED_LIMIT = 10240  # outputs of one that is joined with what follows: gate and up together
CANN = "CANN's docs of aclnnGroupedMatmulSwigluQuantWeightNzV2"
INT8_OUTPUTS = ((torch.bfloat16, torch.bfloat16), (torch.float32, torch.float16))  # of scale and result


def takes_groups(num_experts: int, num_groups: int) -> bool:
    """Whether gating takes so many experts in so many groups: of more than 2, and each padded to whole 32 at most 2048
    experts together."""
    size, rest = divmod(num_experts, num_groups)
    return rest == 0 and size > 2 and num_experts <= 2048 and -(-size // 32) * 32 * num_groups <= 2048


GATING = (
    dtypes(DOC, FLOATS, "x", "bias"),
    same_dtype(DOC, "x", "bias"),
    ranks(DOC, 2, 2, "x"),
    Rule("x may not be empty", "CANN's docs of aclnnMoeGatingTopK", lambda a: a.x.numel() > 0),
    Rule("bias must be [experts]", DOC, lambda a: a.bias is None or a.bias.shape == a.x.shape[1:]),
    Rule("group_count must divide the experts into groups of more than 2, of 2048 experts if each is padded to 32", DOC,
         lambda a: a.group_count > 0 and takes_groups(a.x.shape[1], a.group_count)),
    Rule("k_group must lie in [1, group_count]", DOC, lambda a: 1 <= a.k_group <= a.group_count),
    Rule("k must be positive and fit into the groups that are kept", DOC,
         lambda a: 1 <= a.k <= a.x.shape[1] // a.group_count * a.k_group),
    one_of(DOC, "group_select_mode", (0, 1)),
    one_of(DOC, "norm_type", (0, 1)),
    one_of(f"{DOC}: 'only 0 is supported'", "renorm", (0,)),
)  # fmt: skip

INIT_ROUTING = (
    on_one_device("x", "expert_idx"),
    dtypes(DOC, (*FLOATS, torch.int8), "x"),
    dtypes(DOC, (torch.int32,), "expert_idx"),
    ranks(DOC, 2, 2, "x", "expert_idx"),
    contiguous("house rule: strided inputs are copied", "x", "expert_idx"),
    Rule("x and expert_idx must have as many rows", DOC, lambda a: len(a.x) == len(a.expert_idx)),
    Rule("expert_num must lie in [1, 10240]", DOC, lambda a: 1 <= a.expert_num <= 10240),
    Rule("active_num must be at least -1", DOC, lambda a: a.active_num >= -1),
    one_of(f"{DOC}: 'only 0'", "drop_pad_mode", (0,)),
    one_of(DOC, "expert_tokens_num_type", (1, 2)),
    one_of(f"{DOC}: 'only True'", "expert_tokens_num_flag", (True,)),
    one_of(DOC, "quant_mode", (-1, 1)),
    Rule("int8 input may not be quantised again", DOC, lambda a: a.x.dtype is not torch.int8 or a.quant_mode == -1),
    Rule("active_expert_range must be [start, end) within the experts", DOC,
         lambda a: len(a.active_expert_range) == 2
         and 0 <= a.active_expert_range[0] < a.active_expert_range[1] <= a.expert_num),
    one_of(DOC, "row_idx_type", (0, 1)),
    Rule("experts must exist", DOC,
         lambda a: bool(((a.expert_idx >= 0) & (a.expert_idx < a.expert_num)).all()), reads_values=True),
)  # fmt: skip

UNPERMUTE = (
    ranks(DOC, 2, 2, "permuted_tokens"),
    dtypes(DOC, FLOATS, "permuted_tokens"),
    dtypes(DOC, (torch.int32,), "sorted_indices"),
    ranks(DOC, 1, 1, "sorted_indices"),
    contiguous("house rule: strided inputs are copied", "permuted_tokens", "sorted_indices", "probs"),
    dtypes(DOC, FLOATS, "probs"),
    Rule("probs must be [tokens, experts per token], one for each index", DOC,
         lambda a: a.probs is None or (a.probs.ndim == 2 and a.probs.numel() == len(a.sorted_indices))),
    Rule("there may be at most 512 experts a token", f"{DOC}: A2, A3",
         lambda a: a.probs is None or a.probs.shape[1] <= 512),
    Rule("indices must name a row", DOC,
         lambda a: bool((a.sorted_indices < len(a.permuted_tokens)).all()), reads_values=True),
)  # fmt: skip


def _is_weight_only(a: Any) -> bool:
    parts = (a.antiquant_scale, a.antiquant_offset)
    return a.x.dtype.itemsize == 2 and a.weight.dtype is torch.int8 and all(
        t is not None and t.dtype is a.x.dtype and t.shape == (len(a.weight), a.weight.shape[2]) for t in parts)


GROUPED_MATMUL = (
    on_one_device("x", "weight", "group_list"),
    one_of("house rule: one tensor in, one out", "split_item", (2,)),
    one_of(f"{DOC}: groups of rows", "group_type", (0,)),
    one_of(DOC, "group_list_type", (0, 1)),
    ranks(DOC, 2, 2, "x"),
    ranks(DOC, 3, 3, "weight"),
    contiguous(f"{DOC}: 'x may not be transposed'", "x", "group_list"),
    dtypes(DOC, (torch.int64,), "group_list"),
    dtypes(DOC, (*FLOATS, torch.int8), "x", "weight"),
    Rule("x and weight must have one dtype, or weight int8 with antiquant_scale and _offset [groups, N] of x's dtype",
         DOC, lambda a: _is_weight_only(a) if a.antiquant_scale is not None else a.x.dtype is a.weight.dtype),
    Rule("x must be [M, K] and weight [groups, K, N]", DOC, lambda a: a.x.shape[1] == a.weight.shape[1]),
    Rule("the last axes must be below 65536", DOC,
         lambda a: a.x.shape[1] < INNER_LIMIT and a.weight.shape[2] < INNER_LIMIT),
    Rule("group_list must have an entry a group, of at most 1024", DOC,
         lambda a: a.group_list.shape == a.weight.shape[:1] and len(a.group_list) <= MOST_GROUPS),
    Rule("a list of counts must have more than one entry", DOC,
         lambda a: a.group_list_type == 0 or len(a.group_list) > 1),
    Rule("int8 needs scale [groups, N] of bfloat16 or float32, per_token_scale [M] of float32 and an output dtype",
         f"{DOC}: per-token quantisation",
         lambda a: a.x.dtype is not torch.int8 or (
             a.scale is not None and a.scale.shape == (len(a.weight), a.weight.shape[2])
             and a.per_token_scale is not None and a.per_token_scale.shape == a.x.shape[:1]
             and a.per_token_scale.dtype is torch.float32
             and (a.scale.dtype, a.output_dtype) in INT8_OUTPUTS)),
    Rule("the groups must cover all rows", DOC,
         lambda a: int(a.group_list[-1] if a.group_list_type == 0 else a.group_list.sum()) == len(a.x),
         reads_values=True),
)  # fmt: skip

SWIGLU_QUANT = (
    on_one_device("x", "weight", "weight_scale", "x_scale", "group_list"),
    one_of(DOC, "group_list_type", (0, 1)),
    dtypes(f"{DOC}: W8A8", (torch.int8,), "x", "weight"),
    ranks(DOC, 2, 2, "x"),
    ranks(DOC, 3, 3, "weight"),
    contiguous("house rule: strided inputs are copied", "x", "weight_scale", "x_scale", "group_list"),
    Rule("x may not be empty", CANN, lambda a: a.x.numel() > 0),
    Rule("x must be [M, K] and weight [groups, K, N]", DOC, lambda a: a.x.shape[1] == a.weight.shape[1]),
    Rule("K must be a multiple of 16 below 65536, and N one of 32 up to 10240", f"{CANN}, A2 and A3",
         lambda a: fills_fractals(a.weight.shape, 1) and a.x.shape[1] < INNER_LIMIT
         and a.weight.shape[2] <= GATED_LIMIT),
    Rule("weight must lie in FRACTAL_NZ", f"{DOC}: A2 and A3 take no other",
         lambda a: a.weight.device.type != "npu" or torch.ops.npu.get_npu_format(a.weight) == FRACTAL_NZ),
    dtypes(f"{DOC}; others are brought to it in each call", (torch.float32,), "weight_scale", "x_scale"),
    Rule("weight_scale must be [groups, N] and x_scale [M]", DOC,
         lambda a: a.weight_scale.shape == (len(a.weight), a.weight.shape[2]) and a.x_scale.shape == a.x.shape[:1]),
    dtypes(DOC, (torch.int64,), "group_list"),
    Rule("group_list must have an entry a group, of at most 1024", DOC,
         lambda a: a.group_list.shape == a.weight.shape[:1] and len(a.group_list) <= MOST_GROUPS),
    Rule("the groups must cover all rows", f"{CANN}: other rows of the results are not written",
         lambda a: int(a.group_list[-1] if a.group_list_type == 0 else a.group_list.sum()) == len(a.x),
         reads_values=True),
)  # fmt: skip

MOE_CONTRACTS = (
    Contract("npu_moe_gating_top_k", GATING),
    Contract("npu_moe_init_routing_v2", INIT_ROUTING),
    Contract("npu_moe_token_unpermute", UNPERMUTE),
    Contract("npu_grouped_matmul", GROUPED_MATMUL),
    Contract("npu_grouped_matmul_swiglu_quant_v2", SWIGLU_QUANT),
)
