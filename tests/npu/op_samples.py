"""Arguments for every emulated operator, on the CPU, by operator and case."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

Sample = tuple[tuple[Any, ...], dict[str, Any]]
N, K, D, BLOCKS, BLOCK = 4, 2, 64, 6, 128
HALF, BF16, INT8 = torch.float16, torch.bfloat16, torch.int8


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype)


def ints(*values: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def int8(*shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, dtype=INT8)


@functools.cache
def triangle() -> Tensor:
    return torch.ones(2048, 2048, dtype=INT8).triu(1)


def paged(lens: tuple[int, ...] = (1, 3), kv_lens: tuple[int, ...] = (130, 7), **more: Any) -> Sample:
    """Attention over pages in layout TND, as the engine calls it."""
    query, cache = rand(lens[-1], N, D, dtype=BF16), rand(BLOCKS, BLOCK, K * D, dtype=BF16)
    given: dict[str, Any] = {
        "atten_mask": triangle(), "block_table": ints(1, 2, 3, 4).view(2, 2), "block_size": BLOCK,
        "actual_seq_lengths": list(lens), "actual_seq_lengths_kv": list(kv_lens), "num_heads": N,
        "num_key_value_heads": K, "scale": D**-0.5, "sparse_mode": 3, "input_layout": "TND",
    }  # fmt: skip
    return (query, cache, cache.clone()), given | more


def latent(lens: tuple[int, ...] = (1, 4), kv_lens: tuple[int, ...] = (30, 7), **more: Any) -> Sample:
    """Attention over pages of latents, as the engine calls it (v2)."""
    query, query_rope = rand(lens[-1], 32, 512, dtype=BF16), rand(lens[-1], 32, 64, dtype=BF16)
    cache, key_rope = rand(BLOCKS, 16, 512, dtype=BF16), rand(BLOCKS, 16, 64, dtype=BF16)
    given: dict[str, Any] = {
        "query_rope": query_rope, "key_rope": key_rope, "atten_mask": triangle(), "block_size": 16,
        "block_table": ints(1, 2, 3, 4).view(2, 2), "actual_seq_qlen": list(lens), "actual_seq_kvlen": list(kv_lens),
        "num_query_heads": 32, "num_key_value_heads": 1, "softmax_scale": 0.1, "sparse_mode": 3,
        "input_layout": "TND_NTD",
    }  # fmt: skip
    return (query, cache, cache.clone()), given | more


def dense(layout: str, **more: Any) -> Sample:
    """Attention over two sequences of 5 queries and 9 keys."""
    shapes = {"BSH": (2, 0, N * D), "BSND": (2, 0, N, D), "BNSD": (2, N, 0, D)}

    def made(length: int, heads: int) -> Tensor:
        shape = [length if size == 0 else size for size in shapes[layout.split("_")[0]]]
        return rand(*(heads if size == N else heads * D if size == N * D else size for size in shape), dtype=HALF)

    given = {"num_heads": N, "num_key_value_heads": K, "input_layout": layout, "scale": D**-0.5}
    return (made(5, N), made(9, K), made(9, K)), given | more


def packed(layout: str, key_dim: int = D, value_dim: int = D, **more: Any) -> Sample:
    """Attention over two sequences of 1 and 4 queries, 3 and 6 keys, one after the other."""
    shapes = [(5, N, key_dim), (9, K, key_dim), (9, K, value_dim)]
    parts = [rand(*shape, dtype=BF16) for shape in shapes]
    parts = [each.transpose(0, 1).contiguous() for each in parts] if layout.startswith("NTD") else parts
    given = {
        "num_heads": N, "num_key_value_heads": K, "input_layout": layout, "scale": D**-0.5, "atten_mask": triangle(),
        "sparse_mode": 3, "actual_seq_lengths": [1, 5], "actual_seq_lengths_kv": [3, 9],
    }  # fmt: skip
    return tuple(parts), given | more


V2_NAMES = {
    "actual_seq_lengths": "actual_seq_qlen", "actual_seq_lengths_kv": "actual_seq_kvlen", "scale": "softmax_scale",
    "num_heads": "num_query_heads", "softmax_lse_flag": "return_softmax_lse",
}  # fmt: skip


def v2(sample: Sample, **more: Any) -> Sample:
    args, kwargs = sample
    return args, {V2_NAMES.get(name, name): value for name, value in kwargs.items()} | more


def into(sample: Sample) -> Sample:
    args, kwargs = sample
    return args, {
        **kwargs,
        "workspace": torch.zeros(64, dtype=INT8),
        "out": [torch.zeros_like(args[0]), torch.zeros(0)],
    }


def scatter(name: str = "npu", **more: Any) -> Sample:
    cache = rand(BLOCKS, BLOCK, K, D, dtype=BF16)
    slots = ints(128, 5, 700)
    return (rand(3, K, D, dtype=BF16), rand(3, K, D, dtype=BF16), cache, cache.clone(), slots), more


def paged_decode(out: bool = True) -> Sample:
    cache = rand(BLOCKS, BLOCK, K, D, dtype=BF16)
    query = rand(2, N, D, dtype=BF16)
    table, lens = ints(1, 2, 3, 4).view(2, 2), ints(130, 7)
    return (query, cache, cache.clone(), K, N, D**-0.5, table, lens, torch.zeros_like(query)), {}


def experts(dtype: torch.dtype = BF16) -> Sample:
    given = {"group_list": ints(3, 0, 2, dtype=torch.int64), "group_list_type": 1, "split_item": 2, "group_type": 0}
    return ([rand(5, 32, dtype=dtype)], [rand(3, 32, 48, dtype=dtype)]), given


def int8_experts() -> Sample:
    scales = {"scale": [rand(3, 48, dtype=BF16).abs()], "per_token_scale": [torch.rand(5)], "output_dtype": BF16}
    return ([int8(5, 32)], [int8(3, 32, 48)]), experts()[1] | scales


def gated_experts(**more: Any) -> Sample:
    """The first product of gated mlps, joined with what follows it."""
    scales, counts = ([torch.rand(3, 64) * 0.01], torch.rand(5)), experts()[1]["group_list"]
    return (int8(5, 32), [int8(3, 32, 64)], *scales, counts), {"group_list_type": 1, **more}


def weight_only_experts() -> Sample:
    parts = {"antiquant_scale": [rand(3, 48, dtype=BF16)], "antiquant_offset": [rand(3, 48, dtype=BF16)]}
    return ([rand(5, 32, dtype=BF16)], [int8(3, 32, 48)]), experts()[1] | parts


def routing(**more: Any) -> Sample:
    given = {
        "active_num": 8, "expert_num": 6, "expert_tokens_num_type": 1, "expert_tokens_num_flag": True,
        "active_expert_range": [0, 6], "quant_mode": -1, "row_idx_type": 0,
    }  # fmt: skip
    return (rand(4, 32, dtype=BF16), ints(0, 4, 4, 3, 4, 2, 1, 5).view(4, 2)), given | more


def samples() -> dict[str, dict[str, Sample]]:
    torch.manual_seed(0)
    x, gamma = rand(3, 64, dtype=BF16), rand(64, dtype=BF16)
    cos, sin = rand(1, 3, 1, D, dtype=BF16), rand(1, 3, 1, D, dtype=BF16)
    flat = (rand(3, N * D), rand(3, K * D))
    heads = rand(1, 3, N, D, dtype=BF16)
    logits = rand(3, 40)
    fia, fia2 = "npu::npu_fused_infer_attention_score", "npu::npu_fused_infer_attention_score_v2"
    space, space2 = (f"npu::_{name[5:]}_get_max_workspace" for name in (fia, fia2))
    layouts: dict[str, Sample] = {name: dense(name) for name in ("BSH", "BSND", "BNSD", "BNSD_BSND")}
    layouts |= {name: packed(name) for name in ("TND", "NTD_TND")}
    layouts |= {
        "paged": paged(),
        "paged_lse": paged(softmax_lse_flag=True),
        "lse": dense("BNSD", softmax_lse_flag=True),
    }
    gather_out = rand(9, K, D, dtype=BF16)
    cache = rand(BLOCKS, BLOCK, K, D, dtype=BF16)
    scores = rand(4, 64)
    unpermuted = ((rand(8, 32, dtype=BF16), ints(0, 5, 6, 4, 7, 3, 1, 2), torch.rand(4, 2).to(BF16)), {})
    return {
        "npu::npu_rms_norm": {"2d": ((x, gamma, 1e-5), {}), "3d": ((rand(2, 3, 64), rand(64)), {})},
        "npu::npu_add_rms_norm": {"2d": ((x, x.clone(), gamma, 1e-5), {})},
        "npu::npu_swiglu": {"last": ((x,), {}), "first": ((rand(4, 3, dtype=HALF), 0), {})},
        "npu::npu_rotary_mul": {"half": ((heads, cos, sin), {}), "interleave": ((heads, cos, sin, "interleave"), {})},
        "npu::npu_apply_rotary_pos_emb": {
            "bsnd": ((heads, rand(1, 3, K, D, dtype=BF16), cos, sin), {}),
            "tnd": ((heads[0], rand(3, K, D, dtype=BF16), cos[0], sin[0], "TND"), {}),
        },
        "npu::npu_mrope": {
            "rope": ((ints(0, 5, 9), *flat, rand(16, D), D), {"mrope_section": [0, 0, 0]}),
            "partial": ((ints(0, 5, 9), *flat, rand(16, 32), D), {"rotary_mode": "interleave"}),
            "mrope": ((ints(*range(9)).view(3, 3), *flat, rand(16, D), D), {"mrope_section": [8, 12, 12]}),
        },
        "npu::npu_scatter_pa_kv_cache": {"norm": scatter(cache_mode="Norm"), "nz": scatter()},
        "atb::_npu_reshape_and_cache": {"": scatter()},
        "npu::npu_scatter_nd_update_": {
            "rows": ((rand(9, 4), ints(3, 7).view(2, 1), rand(2, 4)), {}),
            "places": ((rand(9, 4), ints(3, 1, 7, 0).view(2, 2), rand(2)), {}),
        },
        "npu::npu_gather_pa_kv_cache": {
            "": ((cache, cache.clone(), ints(1, 2, 3, 4).view(2, 2), ints(3, 6), gather_out, gather_out.clone()), {}),
        },
        fia: layouts,
        fia2: {name: v2(sample) for name, sample in layouts.items()}
        | {"sink": v2(paged(), learnable_sink=rand(N, dtype=BF16)), "latent": latent(),
           "made": v2(packed("TND", 192, 128))},
        f"{fia}.out": {"paged": into(paged())},
        f"{fia2}.out": {"paged": into(v2(paged()))},
        space: {"paged": paged()},
        space2: {"paged": v2(paged())},
        "atb::_npu_paged_attention": {"": paged_decode()},
        "atb::_npu_paged_attention_get_workspace": {"": paged_decode()},
        "npu::npu_attention_update": {
            "0": (([torch.randn(6), torch.randn(6)], [rand(6, 8), rand(6, 8)], 0), {}),
            "1": (([torch.randn(6), torch.randn(6)], [rand(6, 8), rand(6, 8)], 1), {}),
        },
        "npu::npu_top_k_top_p": {
            "both": ((logits, torch.tensor([0.5, 0.9, 1.0]), ints(1, 7, 40)), {}),
            "k": ((logits,), {"k": ints(1, 7, 40)}),
            "p": ((logits,), {"p": torch.tensor([0.0, 0.3, 0.9])}),
        },
        "npu::npu_dynamic_quant": {"": ((x,), {}), "smooth": ((x,), {"smooth_scales": gamma})},
        "npu::npu_quant_matmul": {
            "bf16": (
                (int8(3, 32), int8(32, 48), torch.rand(48)), {"pertoken_scale": torch.rand(3), "output_dtype": BF16},
            ),
            "int8": ((int8(3, 32), int8(32, 48), torch.full((1,), 1e-3)), {}),
            "bias": ((int8(3, 32), int8(32, 48), torch.rand(48)), {"bias": ints(*range(48)), "output_dtype": HALF}),
        },
        "npu::npu_weight_quant_batchmatmul": {
            "channel": ((rand(3, 64, dtype=HALF), int8(64, 48), rand(1, 48, dtype=HALF)), {}),
            "group": ((rand(3, 64, dtype=HALF), int8(64, 48), rand(2, 48, dtype=HALF)), {"antiquant_group_size": 32}),
        },
        "npu::npu_grouped_matmul": {"bf16": experts(), "int8": int8_experts(), "weights": weight_only_experts()},
        "npu::npu_grouped_matmul_swiglu_quant_v2": {"counts": gated_experts()},
        "npu::npu_moe_gating_top_k_softmax": {"": ((scores, None, 3), {}), "done": ((scores, scores[:, 0] > 0, 3), {})},
        "npu::npu_moe_gating_top_k": {
            "softmax": ((scores, 6), {}),
            "sigmoid": (
                (scores, 6),
                {"bias": rand(64), "k_group": 2, "group_count": 4, "group_select_mode": 1, "norm_type": 1,
                 "out_flag": True, "routed_scaling_factor": 2.5},
            ),
        },
        "npu::npu_moe_init_routing_v2": {
            "all": routing(), "some": routing(active_expert_range=[2, 5]), "scatter": routing(row_idx_type=1),
            "int8": routing(quant_mode=1),
        },
        "npu::npu_moe_token_permute": {"": ((rand(4, 32, dtype=BF16), ints(0, 4, 4, 3, 4, 2, 1, 1).view(4, 2)), {})},
        "npu::npu_moe_token_unpermute": {"": unpermuted},
        "npu::_npu_moe_token_unpermute": {"": unpermuted},
    }  # fmt: skip
