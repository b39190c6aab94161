"""The calls that the wrappers make fit the operators of every version whose schemas are known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from npu_ops import activation, format, linear, moe, norm, rotary, sampling
from npu_ops.attention import Lengths, latent_attention, packed_attention, paged_attention
from npu_ops.contracts import CONTRACTS
from npu_ops.kv import Dense, write_kv
from npu_ops.linear import Int8Part
from tests.emulated_npu.schemas import known
from tests.npu.device import npu, randn

BF16, I32 = torch.bfloat16, torch.int32


class Calls(TorchDispatchMode):
    """What operators of torch_npu are called with: how many arguments by position, and the names of the others."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, list[tuple[int, set[str]]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "npu":
            name = func.name().replace("npu::_npu_moe", "npu::npu_moe")  # what an operator with a gradient calls
            self.seen.setdefault(name, []).append((len(args), set(kwargs or {})))
        return func(*args, **(kwargs or {}))


def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=npu().device)


def call_everything() -> None:
    """Every wrapper once."""
    x, gamma = randn(4, 64, dtype=BF16), randn(64, dtype=BF16)
    norm.rms_norm(x=x, gamma=gamma, epsilon=1e-6)
    norm.add_rms_norm(x=x, residual=x.clone(), gamma=gamma, epsilon=1e-6)
    activation.swiglu(gate_up=x)
    heads, positions = x[:, None].contiguous(), zeros(4, dtype=I32)
    cos, sin = rotary.angles(randn(9, 64), positions, BF16)
    rotary.rotary_mul(x_TNH=heads, cos=cos, sin=sin)
    rotary.apply_rotary_pos_emb(query_TNH=heads.clone(), key_TKH=heads.clone(), cos=cos, sin=sin)
    rotary.mrope(positions=positions, query_TX=x, key_TX=x, cos_sin_LR=randn(9, 64, dtype=BF16), head_dim=64)
    cache = Dense.of(zeros(3, 128, 1, 64, dtype=BF16))
    slots = torch.arange(128, 132, dtype=I32, device=npu().device)
    write_kv(key_TKH=heads, value_TKH=heads, key=cache, value=cache, slots_T=slots)
    table, lengths = torch.ones(1, 1, dtype=I32, device=npu().device), Lengths([4], [4])
    for window in (None, 2):
        paged_attention(query_TNH=heads, key_BPX=cache.rows_BPX, value_BPX=cache.rows_BPX, block_table_SM=table,
                        lengths=lambda: lengths, num_kv_heads=1, scale=1.0, sliding_window=window)
    latent_attention(query_TNL=randn(4, 32, 512, dtype=BF16), query_rope_TNR=randn(4, 32, 64, dtype=BF16),
                     key_BPL=zeros(3, 128, 512, dtype=BF16), key_rope_BPR=zeros(3, 128, 64, dtype=BF16),
                     block_table_SM=table, lengths=lambda: lengths, scale=1.0)
    packed_attention(query_TNH=heads, key_CNH=heads, value_CNV=heads, lengths=lengths, scale=1.0)
    codes, scale = zeros(32, 64, dtype=torch.int8), torch.ones(32, device=npu().device)
    linear.weight_quant_matmul(x_MX=x, part=Int8Part(codes, scale.to(BF16), None))
    linear.linear_w8a8(x, linear.pack_w8a8(codes_YX=codes, scale_Y=scale, bias_Y=None, dtype=BF16))
    format.cast_format(x=randn(16, 16, dtype=BF16), acl_format=format.FRACTAL_NZ)
    sampling.top_k_top_p(logits_SV=randn(2, 9), k_S=torch.tensor([2, 3], dtype=I32, device=npu().device))
    weights, ids, _ = moe.gating(logits_TE=randn(4, 8), k=2, bias_E=randn(8))
    for scales, rounds_inputs in (([], False), ([scale] * 8, False), ([scale] * 8, True)):
        weight = (codes if scales else codes.to(BF16)).t().contiguous()
        experts = moe.stack([weight] * 8, scales, dtype=BF16, rounds_inputs=rounds_inputs)
        mode = moe.PER_TOKEN if rounds_inputs else moe.PLAIN
        rows, row_scales, order = moe.init_routing(x_TX=x, ids_TK=ids, num_experts=8, quant_mode=mode)
        out = moe.grouped_linear(x_RX=rows, scale_R=row_scales if rounds_inputs else None, experts=experts,
                                 counts_E=order.counts_E, dtype=BF16)
    gated = moe.stack([codes.t().contiguous()] * 8, [scale] * 8, dtype=BF16, rounds_inputs=True, is_gated=True)
    moe.swiglu_quant(x_RX=rows, scale_R=row_scales, experts=gated, counts_E=order.counts_E)
    moe.unpermute(x_RX=out, row_of_R=order.row_of_R, weights_TK=weights)


@pytest.fixture(scope="module")
def calls() -> dict[str, list[tuple[int, set[str]]]]:
    npu()
    with Calls() as watch:
        call_everything()
    return watch.seen


def test_every_wrapped_operator_is_called(calls: dict[str, list[tuple[int, set[str]]]]) -> None:
    assert {f"npu::{contract.op}" for contract in CONTRACTS.values()} <= set(calls)


@pytest.mark.parametrize("version", sorted(known()))
def test_calls_fit(version: str, calls: dict[str, list[tuple[int, set[str]]]]) -> None:
    schemas, checked = known()[version], 0
    for name, made in calls.items():
        text = schemas.get(name)
        if text is None:
            assert name.startswith(("npu::_", "npu::get_")), f"{version} is not known to have {name}"
            continue
        arguments = torch._C.parse_schema(text).arguments
        names, positional = {a.name for a in arguments}, sum(not a.kwarg_only for a in arguments)
        for num_args, keywords in made:
            assert num_args <= positional and keywords <= names, (version, name, num_args, keywords - names)
            assert all(a.has_default_value() or a.name in keywords for a in arguments[num_args:]), (version, name)
        checked += 1
    assert checked >= len({contract.op for contract in CONTRACTS.values()})
