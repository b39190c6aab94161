"""Every rule of every contract: a call that keeps all, and for each rule one that breaks it and is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from npu_ops import activation, contracts, format, linear, moe, norm, rotary, sampling
from npu_ops.attention import causal_mask
from npu_ops.contract import CHECKING, ContractError, set_checking
from npu_ops.contracts import CONTRACTS, PACKED
from npu_ops.linear import Int8Part, W8A8Part
from npu_ops.recording import recording
from tests.npu.device import npu

Arguments = dict[str, Any]
F32, BF16, F16, I8, I32, I64 = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.int32, torch.int64)


def t(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=npu().device)


def of(*values: Any, dtype: torch.dtype = I32) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=npu().device)


def strided(x: Tensor) -> Tensor:
    """The same shape, no longer contiguous."""
    return torch.stack((x, x), dim=-1)[..., 0]


def on_host(x: Tensor) -> Tensor:
    return x.cpu()


def attention() -> Arguments:
    """Two sequences, of 2 and 1 tokens."""
    return {"query": t(BF16, 3, 4, 16), "key": t(BF16, 5, 128, 32), "value": t(BF16, 5, 128, 32),
            "atten_mask": causal_mask(npu().device), "block_table": of([1, 0], [2, 3]), "block_size": 128,
            "input_layout": "TND", "num_heads": 4, "num_key_value_heads": 2, "scale": 0.25, "sparse_mode": 3,
            "pre_tokens": 2**31 - 1, "next_tokens": 2**31 - 1, "actual_seq_lengths": [2, 3],
            "actual_seq_lengths_kv": [2, 200]}  # fmt: skip


def latent() -> Arguments:
    return {"query": t(BF16, 3, 32, 512), "query_rope": t(BF16, 3, 32, 64), "key": t(BF16, 5, 16, 512),
            "value": t(BF16, 5, 16, 512), "key_rope": t(BF16, 5, 16, 64), "atten_mask": causal_mask(npu().device),
            "block_table": of([1, 0], [2, 3]), "block_size": 16, "input_layout": "TND_NTD", "num_heads": 32,
            "num_key_value_heads": 1, "sparse_mode": 3, "actual_seq_lengths": [2, 3],
            "actual_seq_lengths_kv": [2, 30]}  # fmt: skip


def packed() -> Arguments:
    """Two sequences, of 2 and 1 tokens, and of 2 and 4 keys."""
    return {"query": t(BF16, 3, 4, 192), "key": t(BF16, 6, 4, 192), "value": t(BF16, 6, 4, 128),
            "atten_mask": causal_mask(npu().device), "input_layout": "TND", "num_heads": 4, "num_key_value_heads": 4,
            "sparse_mode": 3, "actual_seq_lengths": [2, 3], "actual_seq_lengths_kv": [2, 6]}  # fmt: skip


def scatter() -> Arguments:
    return {"key": t(BF16, 3, 2, 16), "value": t(BF16, 3, 2, 16), "key_cache": t(BF16, 4, 128, 2, 16),
            "value_cache": t(BF16, 4, 128, 2, 16), "slot_mapping": of(130, 0, 0), "cache_mode": "Norm"}  # fmt: skip


def rms() -> Arguments:
    return {"input": t(BF16, 3, 16), "gamma": t(BF16, 16), "epsilon": 1e-6}


def add_rms() -> Arguments:
    return {"x1": t(BF16, 3, 16), "x2": t(BF16, 3, 16), "gamma": t(BF16, 16), "epsilon": 1e-6}


def rotary_mul() -> Arguments:
    return {"input": t(F16, 1, 3, 2, 16), "r1": t(F16, 1, 3, 1, 16), "r2": t(F16, 1, 3, 1, 16), "rotary_mode": "half"}


def apply_rotary() -> Arguments:
    return {"query": t(F16, 3, 2, 64), "key": t(F16, 3, 1, 64), "cos": t(F16, 3, 1, 64), "sin": t(F16, 3, 1, 64),
            "layout": "TND", "rotary_mode": "half"}


def mrope() -> Arguments:
    return {"positions": of([0, 1, 2], [0, 1, 2], [0, 1, 2]), "query": t(F16, 3, 128), "key": t(F16, 3, 64),
            "cos_sin_cache": t(F16, 9, 64), "head_size": 64, "mrope_section": [8, 12, 12],
            "rotary_mode": "half"}  # fmt: skip


def top_k_top_p() -> Arguments:
    return {"logits": t(F32, 2, 9), "p": of(0.5, 0.6, dtype=F32), "k": of(3, 9)}


def weight_quant() -> Arguments:
    return {"x": t(BF16, 3, 16), "weight": t(I8, 8, 16).t(), "antiquant_scale": t(BF16, 8), "bias": t(F32, 8)}


def quant_matmul() -> Arguments:
    return {"x1": t(I8, 3, 16), "x2": t(I8, 16, 8), "scale": t(BF16, 8), "pertoken_scale": t(F32, 3),
            "bias": t(BF16, 8), "output_dtype": BF16}  # fmt: skip


def dynamic_quant() -> Arguments:
    return {"input": t(BF16, 3, 16), "smooth_scales": t(BF16, 16)}


def format_cast() -> Arguments:
    return {"input": t(BF16, 16, 32), "acl_format": 29}


def gating() -> Arguments:
    return {"x": t(F32, 3, 16), "k": 4, "bias": t(F32, 16), "k_group": 2, "group_count": 4, "group_select_mode": 1,
            "norm_type": 1, "renorm": 0}


def init_routing() -> Arguments:
    return {"x": t(BF16, 3, 16), "expert_idx": of([0, 1], [2, 3], [1, 0]), "active_num": 6, "expert_num": 4,
            "drop_pad_mode": 0, "expert_tokens_num_type": 1, "expert_tokens_num_flag": True,
            "active_expert_range": [0, 4], "quant_mode": -1, "row_idx_type": 0}  # fmt: skip


def unpermute() -> Arguments:
    return {"permuted_tokens": t(BF16, 6, 16), "sorted_indices": of(0, 1, 2, 3, 4, 5), "probs": t(BF16, 3, 2)}


def grouped() -> Arguments:
    return {"x": t(BF16, 6, 16), "weight": t(BF16, 2, 16, 8), "group_list": of(2, 4, dtype=I64), "split_item": 2,
            "group_type": 0, "group_list_type": 1, "scale": None, "per_token_scale": None, "antiquant_scale": None,
            "antiquant_offset": None, "output_dtype": None}


def swiglu_quant() -> Arguments:
    weight = format.cast_format(x=t(I8, 2, 16, 32), acl_format=29)
    return {"x": t(I8, 6, 16), "weight": weight, "weight_scale": t(F32, 2, 32), "x_scale": t(F32, 6),
            "group_list": of(2, 4, dtype=I64), "group_list_type": 1}


def swiglu() -> Arguments:
    return {"input": t(BF16, 3, 16), "dim": -1}


BASES: dict[str, Callable[[], Arguments]] = {
    "npu_fused_infer_attention_score": attention, "npu_fused_infer_attention_score_v2": latent,
    f"npu_fused_infer_attention_score_v2{PACKED}": packed,
    "npu_scatter_pa_kv_cache": scatter, "npu_rms_norm": rms, "npu_add_rms_norm": add_rms,
    "npu_rotary_mul": rotary_mul, "npu_apply_rotary_pos_emb": apply_rotary, "npu_mrope": mrope,
    "npu_swiglu": swiglu, "npu_top_k_top_p": top_k_top_p, "npu_weight_quant_batchmatmul": weight_quant,
    "npu_quant_matmul": quant_matmul, "npu_dynamic_quant": dynamic_quant, "npu_format_cast": format_cast,
    "npu_moe_gating_top_k": gating, "npu_moe_init_routing_v2": init_routing, "npu_moe_token_unpermute": unpermute,
    "npu_grouped_matmul": grouped, "npu_grouped_matmul_swiglu_quant_v2": swiglu_quant,
}  # fmt: skip

# By operator: what is changed of the call that is right. A value may be a function of the argument that it replaces.
BROKEN: dict[str, list[Arguments]] = {
    "npu_fused_infer_attention_score": [
        {"block_table": on_host}, {"query": Tensor.float}, {"query": Tensor.half}, {"query": strided},
        {"input_layout": "BSH"}, {"query": lambda q: q[None]}, {"value": lambda v: v[:4]}, {"num_heads": 2},
        {"num_key_value_heads": 3}, {"num_key_value_heads": 0},
        {"query": lambda q: q.new_zeros(3, 260, 16), "num_heads": 260, "num_key_value_heads": 130},
        {"query": lambda q: q.new_zeros(3, 4, 24)}, {"query": lambda q: q.new_zeros(3, 4, 528)},
        {"key": lambda k: k.new_zeros(5, 128, 64), "value": lambda v: v.new_zeros(5, 128, 64)},
        {"block_size": 64, "key": lambda k: k.new_zeros(5, 64, 32), "value": lambda v: v.new_zeros(5, 64, 32)},
        {"key": lambda k: k.new_zeros(1, 128, 65536), "value": lambda v: v.new_zeros(1, 128, 65536), "num_heads": 256,
         "num_key_value_heads": 128, "query": lambda q: q.new_zeros(3, 256, 512)},
        {name: lambda x: x[:1].expand(2**19, 128, 32) for name in ("key", "value")},  # 2^31 numbers
        {"actual_seq_lengths": [4, 3]}, {"actual_seq_lengths": None}, {"actual_seq_lengths": [1, 2]},
        {"actual_seq_lengths": [1] * 65536 + [3], "actual_seq_lengths_kv": [1] * 65537},
        {"actual_seq_lengths_kv": None}, {"actual_seq_lengths_kv": [2]}, {"actual_seq_lengths_kv": [1, 200]},
        {"block_table": Tensor.long}, {"block_table": lambda b: b[:, :1]}, {"block_table": lambda b: b + 3},
        {"sparse_mode": 0}, {"sparse_mode": 4, "pre_tokens": -2, "next_tokens": 0},
        {"atten_mask": Tensor.float}, {"atten_mask": None}, {"atten_mask": lambda m: m[:1024, :1024].contiguous()},
    ],
    "npu_fused_infer_attention_score_v2": [
        {"block_table": on_host}, {name: lambda x: x[:1].expand(2**18, 16, 512) for name in ("key", "value")},
        {"query": Tensor.float}, {"key_rope": Tensor.half}, {"key": strided}, {"input_layout": "TND"},
        {"query": lambda q: q[None]}, {"query": lambda q: q.new_zeros(3, 32, 256)},
        {"query_rope": lambda q: q.new_zeros(3, 32, 32)}, {"num_heads": 16},
        {"num_heads": 64}, {"num_key_value_heads": 2}, {"block_size": 32}, {"key_rope": lambda k: k[:4]},
        {"value": lambda v: v[:4]}, {"actual_seq_lengths": [2, 4]},
        {"actual_seq_lengths": [3, 3]}, {"actual_seq_lengths_kv": [1, 30]}, {"block_table": Tensor.long},
        {"block_table": lambda b: b[:, :1]}, {"sparse_mode": 0}, {"atten_mask": None},
    ],
    f"npu_fused_infer_attention_score_v2{PACKED}": [
        {"key": on_host}, {"query": Tensor.float}, {"key": Tensor.half}, {"value": strided}, {"input_layout": "BSND"},
        {"query": lambda q: q[0]}, {"num_heads": 2}, {"num_key_value_heads": 2},
        {"key": lambda k: k[:, :2].contiguous()}, {"query": lambda q: q.new_zeros(3, 4, 128)},
        {"value": lambda v: v.new_zeros(6, 4, 144)},
        {"actual_seq_lengths_kv": [1, 6]}, {"actual_seq_lengths_kv": [6]}, {"actual_seq_lengths_kv": [2, 5]},
        {"actual_seq_lengths": [1, 2]}, {"value": lambda v: v[:5]},
        {"actual_seq_lengths": [0] * 4096 + [3], "actual_seq_lengths_kv": [0] * 4096 + [6]},
        {name: lambda x: x.new_zeros(2**20 + 1, 1, 16) for name in ("key", "value")}
        | {"query": lambda q: q.new_zeros(3, 1, 16), "num_heads": 1, "num_key_value_heads": 1,
           "actual_seq_lengths_kv": [2, 2**20 + 1]},
        {"sparse_mode": 0}, {"atten_mask": Tensor.float}, {"atten_mask": lambda m: m[:1024, :1024].contiguous()},
    ],
    "npu_scatter_pa_kv_cache": [
        {"key": on_host}, {"cache_mode": "PA_NZ"}, {"key": lambda k: k[None]}, {"key_cache": lambda k: k.flatten(2)},
        {"key": Tensor.half}, {"value": strided}, {"slot_mapping": Tensor.byte},
        {"slot_mapping": lambda s: s[:2]}, {"value_cache": lambda v: v.new_zeros(4, 128, 2, 32)},
        {"slot_mapping": lambda s: s - 1}, {"slot_mapping": lambda s: s + 4 * 128}, {"slot_mapping": lambda s: s + 1},
    ],
    "npu_rms_norm": [
        {"gamma": on_host}, {"input": Tensor.short}, {"gamma": Tensor.half}, {"input": lambda x: x[0]},
        {"input": strided}, {"gamma": lambda g: g[:8]}, {"epsilon": 0.0},
    ],
    "npu_add_rms_norm": [
        {"x2": on_host}, {"x1": Tensor.short}, {"x2": Tensor.half}, {"x1": lambda x: x[0]}, {"x2": strided},
        {"x2": lambda x: x[:2]}, {"gamma": lambda g: g[:8]}, {"epsilon": -1.0},
    ],
    "npu_rotary_mul": [
        {"r1": on_host}, {"input": Tensor.short}, {"r1": Tensor.float}, {"input": lambda x: x[0]}, {"r2": strided},
        {"rotary_mode": "quarter"}, {"r2": lambda r: r[:, :2]}, {"r1": lambda r: r[:, :2], "r2": lambda r: r[:, :2]},
        {"input": lambda x: x[..., :15].contiguous(), "r1": lambda r: r[..., :15].contiguous(),
         "r2": lambda r: r[..., :15].contiguous()},
        {"input": lambda x: x.new_zeros(1, 3, 1000, 16)},
        {"rotary_mode": "interleave", "r1": lambda r: r.new_zeros(1, 3, 2, 16),
         "r2": lambda r: r.new_zeros(1, 3, 2, 16)},
    ],
    "npu_apply_rotary_pos_emb": [
        {"key": on_host}, {"query": Tensor.short}, {"key": Tensor.float}, {"layout": "BSND"},
        {"rotary_mode": "interleave"}, {"query": lambda q: q[None]}, {"query": strided},
        {"query": lambda q: q[..., :32].contiguous()}, {"key": lambda k: k[:2]},
        {"cos": lambda c: c.new_zeros(3, 2, 64)},
    ],
    "npu_mrope": [
        {"positions": on_host}, {"positions": Tensor.byte}, {"query": Tensor.short}, {"key": Tensor.float},
        {"query": lambda q: q[None]}, {"rotary_mode": "interleaved"}, {"key": lambda k: k[:, :60]},
        {"positions": lambda p: p[:2]}, {"cos_sin_cache": lambda c: c[:, :48]}, {"mrope_section": [8, 8, 8]},
        {"positions": lambda p: p + 7},
    ],
    "npu_swiglu": [{"input": Tensor.short}, {"input": lambda x: x[0, 0]}, {"input": strided},
                   {"input": lambda x: x[:, :15].contiguous()}],
    "npu_top_k_top_p": [
        {"logits": Tensor.short}, {"p": Tensor.half}, {"logits": lambda x: x[None]}, {"p": None, "k": None},
        {"k": Tensor.long}, {"k": lambda k: k[:1]}, {"k": lambda k: k - 3}, {"k": lambda k: k + 1},
        {"p": lambda p: p + 0.5},
    ],
    "npu_weight_quant_batchmatmul": [
        {"x": on_host}, {"x": Tensor.float}, {"weight": Tensor.bfloat16}, {"antiquant_scale": Tensor.half},
        {"x": lambda x: x[None]}, {"x": lambda x: x[:, :8]},
        {"weight": lambda w: w.new_zeros(16, 65536), "antiquant_scale": lambda s: s.new_zeros(65536)},
        {"x": lambda x: x[:0]}, {"antiquant_scale": lambda s: s[:4]}, {"bias": Tensor.bfloat16},
        {"bias": lambda b: b[:3]}, {"weight": strided},
    ],
    "npu_quant_matmul": [
        {"x2": on_host}, {"x1": Tensor.int}, {"x1": lambda x: x[0]}, {"x1": lambda x: x[:, :8]},
        {"x2": lambda x: x.new_zeros(16, 65536)}, {"x1": lambda x: x[:0]}, {"output_dtype": None},
        {"pertoken_scale": Tensor.bfloat16}, {"scale": Tensor.half}, {"output_dtype": F16},
        {"scale": lambda s: s[:4]}, {"pertoken_scale": lambda s: s[:2]}, {"bias": lambda b: b[:3]},
    ],
    "npu_dynamic_quant": [{"input": Tensor.float}, {"smooth_scales": Tensor.half}, {"input": lambda x: x[0]},
                          {"smooth_scales": lambda s: s[:3]}],
    "npu_format_cast": [{"acl_format": 30}, {"input": strided}, {"input": lambda x: x[0]}, {"input": Tensor.short},
                        {"input": lambda x: x[:15]}],
    "npu_moe_gating_top_k": [
        {"x": Tensor.short}, {"bias": Tensor.half}, {"x": lambda x: x[None]}, {"x": lambda x: x[:0]},
        {"x": lambda x: x.new_zeros(1, 2049), "bias": None, "group_count": 1, "k_group": 1},
        {"bias": lambda b: b[:3]}, {"group_count": 8}, {"group_count": 3},
        {"x": lambda x: x.new_zeros(1, 2048), "bias": None, "group_count": 512}, {"k_group": 5}, {"k": 9}, {"k": 0},
        {"group_select_mode": 2}, {"norm_type": 2}, {"renorm": 1},
    ],
    "npu_moe_init_routing_v2": [
        {"x": on_host}, {"x": Tensor.short}, {"expert_idx": Tensor.long}, {"x": lambda x: x[None]}, {"x": strided},
        {"x": lambda x: x[:2]}, {"expert_num": 0}, {"active_num": -2}, {"drop_pad_mode": 1},
        {"expert_tokens_num_type": 0}, {"expert_tokens_num_flag": False}, {"quant_mode": 0},
        {"x": Tensor.char, "quant_mode": 1}, {"active_expert_range": [0, 5]}, {"row_idx_type": 2},
        {"expert_idx": lambda i: i + 1},
    ],
    "npu_moe_token_unpermute": [
        {"permuted_tokens": lambda x: x[0]}, {"permuted_tokens": Tensor.short}, {"sorted_indices": Tensor.long},
        {"sorted_indices": lambda i: i[None]}, {"probs": strided}, {"probs": Tensor.short},
        {"probs": lambda p: p[:2]},
        {"probs": lambda p: p.new_zeros(1, 513), "sorted_indices": lambda i: i.new_zeros(513)},
        {"sorted_indices": lambda i: i + 1},
    ],
    "npu_grouped_matmul": [
        {"group_list": on_host}, {"split_item": 0}, {"group_type": -1}, {"group_list_type": 2},
        {"x": lambda x: x[None]}, {"weight": lambda w: w[0]}, {"x": strided}, {"group_list": Tensor.int},
        {"x": Tensor.short, "weight": Tensor.short}, {"x": Tensor.half}, {"x": lambda x: x[:, :8].contiguous()},
        {"weight": lambda w: w.new_zeros(2, 16, 65536)}, {"group_list": lambda g: g[:1]},
        {"group_list": lambda g: g[:1], "weight": lambda w: w[:1]},
        {"x": Tensor.char, "weight": Tensor.char}, {"group_list": lambda g: g + 1}, {"weight": Tensor.char},
        {"weight": Tensor.char, "antiquant_scale": lambda _: t(BF16, 2, 8)},
        {"weight": Tensor.char, "antiquant_scale": lambda _: t(BF16, 2, 8), "antiquant_offset": lambda _: t(F16, 2, 8)},
        {"antiquant_scale": lambda _: t(BF16, 2, 8), "antiquant_offset": lambda _: t(BF16, 2, 8)},
        {"group_list_type": 0},
    ],
    "npu_grouped_matmul_swiglu_quant_v2": [
        {"group_list": on_host}, {"group_list_type": 2}, {"x": Tensor.half}, {"x": lambda x: x[None]},
        {"weight": lambda _: t(I8, 16, 32)}, {"x": strided}, {"x": lambda x: x[:0]},
        {"x": lambda x: x[:, :8].contiguous()},
        {"x": lambda x: x.new_zeros(6, 24), "weight": lambda _: t(I8, 2, 24, 32)},
        {"weight": lambda _: t(I8, 2, 16, 48)}, {"weight": lambda _: t(I8, 1, 16, 10272)},
        {"x": lambda x: x.new_zeros(1, 65536), "weight": lambda _: t(I8, 1, 65536, 32)},
        {"weight": lambda _: t(I8, 2, 16, 32)}, {"weight_scale": Tensor.bfloat16}, {"x_scale": Tensor.half},
        {"weight_scale": lambda s: s[:1]}, {"x_scale": lambda s: s[:5]}, {"group_list": Tensor.int},
        {"group_list": lambda g: g[:1]}, {"group_list": lambda g: g + 1}, {"group_list_type": 0},
    ],
}  # fmt: skip


def changed(op: str, changes: Arguments) -> Arguments:
    arguments = BASES[op]()
    for name, value in changes.items():
        arguments[name] = value(arguments[name]) if callable(value) and not isinstance(value, Tensor) else value
    return arguments


def broken_rule(op: str, changes: Arguments) -> str | None:
    """The text of the rule that refuses the changed call."""
    try:
        CONTRACTS[op].check(changed(op, changes), read_values=True)
    except ContractError as error:
        words = str(error)
        return next(r.text for r in CONTRACTS[op].rules if words.startswith(f"{op}: {r.text} ({r.source}); got "))
    return None


@pytest.mark.parametrize("op", CONTRACTS)
def test_a_call_that_is_right_passes(op: str) -> None:
    CONTRACTS[op].check(BASES[op](), read_values=True)


@pytest.mark.parametrize("op", CONTRACTS)
def test_every_rule_bites(op: str) -> None:
    refused = [broken_rule(op, changes) for changes in BROKEN[op]]
    passed = [changes for changes, rule in zip(BROKEN[op], refused) if rule is None]
    assert not passed, passed
    assert {rule.text for rule in CONTRACTS[op].rules} - set(refused) == set()


@pytest.mark.parametrize("op", CONTRACTS)
def test_every_rule_says_where_it_stands(op: str) -> None:
    assert all(rule.source and rule.text for rule in CONTRACTS[op].rules)


def wrong_calls() -> dict[str, Callable[[], object]]:
    """Each wrapper, with one tensor of a dtype that its operator does not take."""
    bad, device = t(torch.float64, 4, 16), npu().device
    angles = t(torch.float64, 1, 4, 1, 8)
    return {
        "npu_rms_norm": lambda: norm.rms_norm(x=bad, gamma=bad[0], epsilon=1e-6),
        "npu_add_rms_norm": lambda: norm.add_rms_norm(x=bad, residual=bad, gamma=bad[0], epsilon=1e-6),
        "npu_rotary_mul": lambda: rotary.rotary_mul(x_TNH=bad.view(4, 2, 8), cos=angles, sin=angles),
        "npu_apply_rotary_pos_emb": lambda: rotary.apply_rotary_pos_emb(
            query_TNH=bad[:, None], key_TKH=bad[:, None], cos=bad[None, :, None], sin=bad[None, :, None]),
        "npu_mrope": lambda: rotary.mrope(positions=t(I32, 4), query_TX=bad, key_TX=bad, cos_sin_LR=bad, head_dim=16),
        "npu_swiglu": lambda: activation.swiglu(gate_up=bad),
        "npu_top_k_top_p": lambda: sampling.top_k_top_p(logits_SV=bad, p_S=bad[:, 0]),
        "npu_format_cast": lambda: format.cast_format(x=bad, acl_format=29),
        "npu_weight_quant_batchmatmul": lambda: linear.weight_quant_matmul(
            x_MX=bad, part=Int8Part(t(I8, 4, 16), bad[0], None)),
        "npu_dynamic_quant": lambda: linear.dynamic_quant(x=bad),
        "npu_quant_matmul": lambda: linear.quant_matmul(
            codes_MX=bad, scale_M=bad[:, 0], part=W8A8Part(t(I8, 16, 4), bad[0], None), dtype=BF16),
        "npu_moe_gating_top_k": lambda: moe.gating(logits_TE=bad, k=2),
        "npu_moe_init_routing_v2": lambda: moe.init_routing(x_TX=bad, ids_TK=t(I32, 4, 2), num_experts=4),
        "npu_moe_token_unpermute": lambda: moe.unpermute(x_RX=bad, row_of_R=t(I32, 4), weights_TK=bad[:, :1]),
        "npu_grouped_matmul": lambda: moe.grouped_matmul(x_RX=bad, weight_EXY=t(BF16, 2, 16, 4),
                                                         counts_E=torch.tensor([2, 2], device=device)),
        "npu_grouped_matmul_swiglu_quant_v2": lambda: moe.swiglu_quant(
            x_RX=bad, scale_R=bad[:, 0], experts=moe.StackedExperts(t(I8, 2, 16, 32), t(F32, 2, 32)),
            counts_E=torch.tensor([2, 2], device=device)),
    }  # fmt: skip


@pytest.mark.parametrize("op", [op for op in CONTRACTS if "attention" not in op and "scatter" not in op])
def test_every_wrapper_checks(op: str) -> None:
    """Those of attention and of the cache are checked by whole steps in `test_attention.py` and `test_ops.py`."""
    assert CHECKING.on
    with pytest.raises(ContractError, match=f"^{op}: "):
        wrong_calls()[op]()


def test_unchecked_calls_go_through() -> None:
    x = t(F32, 3, 3)
    set_checking(False)
    try:
        contracts.check("npu_rms_norm", input=x, gamma=None, epsilon=-1)
    finally:
        set_checking(True)


def test_nothing_is_read_back_while_a_graph_is_captured() -> None:
    npu()
    wrong = {**scatter(), "slot_mapping": of(7, 7, 7)}
    with pytest.raises(ContractError, match="slots must differ"):
        contracts.check("npu_scatter_pa_kv_cache", **wrong)
    with recording(None):
        contracts.check("npu_scatter_pa_kv_cache", **wrong)
    assert CHECKING.reads_values()
