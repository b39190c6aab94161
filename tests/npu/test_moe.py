"""Mixtures of experts: gating, routing, grouped products and the way back, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from backends.reference.linear import quantize_rows
from npu_ops import linear, moe
from npu_ops.format import FRACTAL_NZ, cast_format
from tests.npu.device import HALVES, assert_near, npu, randn

T, E, K, D, F = 19, 8, 3, 64, 32


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def routing() -> tuple[Tensor, Tensor]:
    """Ids int32 [T, K], of which one expert gets none, and weights."""
    scores = torch.rand(T, E)
    scores[:, 5] = -1
    ids = scores.topk(K, dim=1).indices.int()
    return ids.to(npu().device), torch.rand(T, K).to(npu().device)


@pytest.mark.parametrize("bias", [False, True])
def test_gating_by_groups_of_experts(bias: bool) -> None:
    """DeepSeek-V3: sigmoid, the two best groups by the sum of their best two, then the best experts in those."""
    logits, added = randn(T, 16), randn(16) if bias else None
    weights, ids, norms = moe.gating(logits_TE=logits, k=4, bias_E=added, k_group=2, group_count=4,
                              group_select_mode=moe.BEST_TWO, norm_type=moe.SIGMOID, routed_scaling_factor=2.5)
    scores = logits.cpu().double().sigmoid()
    ranked = scores + (added.cpu().double() if added is not None else 0)
    groups = ranked.view(T, 4, 4).topk(2, dim=2).values.sum(2).topk(2, dim=1).indices
    inside = torch.zeros(T, 4).scatter_(1, groups, 1.0).bool().repeat_interleave(4, 1)
    truth = ranked.masked_fill(~inside, float("-inf")).topk(4, dim=1).indices
    assert torch.equal(ids.cpu().long(), truth)
    chosen = scores.gather(1, truth)
    assert_near(norms, scores)
    assert_near(weights, chosen / chosen.sum(1, keepdim=True) * 2.5)


def test_routing_and_back() -> None:
    ids, weights = routing()
    x = randn(T, D, dtype=torch.bfloat16)
    x_RD, _, order = moe.init_routing(x_TX=x, ids_TK=ids, num_experts=E)
    row_of_R, counts = order.row_of_R, order.counts_E
    flat = ids.cpu().flatten().long()
    assert counts.tolist() == flat.bincount(minlength=E).tolist() and counts.dtype is torch.int64
    assert torch.equal(x_RD.cpu()[row_of_R.cpu().long()], x.cpu().repeat_interleave(K, 0))
    of_row = torch.empty(T * K, dtype=torch.long)
    of_row[row_of_R.cpu().long()] = flat
    assert (of_row.diff() >= 0).all()
    back = moe.unpermute(x_RX=x_RD, row_of_R=row_of_R, weights_TK=weights.bfloat16())
    assert_near(back, x.cpu().double() * weights.bfloat16().cpu().double().sum(1, keepdim=True))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_grouped_matmul(dtype: torch.dtype) -> None:
    counts = torch.tensor([4, 0, 7, 2])
    x, weight = randn(13, D, dtype=dtype), randn(4, D, F, dtype=dtype)
    found = moe.grouped_matmul(x_RX=x, weight_EXY=weight, counts_E=counts.to(npu().device))
    parts = zip(x.cpu().double().split(counts.tolist()), weight.cpu().double())
    assert_near(found, torch.cat([rows @ w for rows, w in parts]))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_grouped_matmul_of_int8(dtype: torch.dtype) -> None:
    counts = torch.tensor([4, 0, 7, 2])
    x, codes = randn(13, D, dtype=dtype), torch.randint(-127, 128, (4, D, F), dtype=torch.int8).to(npu().device)
    scale = (torch.rand(4, F) * 0.01 + 0.01).to(torch.bfloat16 if dtype is torch.bfloat16 else torch.float32)
    x_codes, x_scale = linear.dynamic_quant(x=x)
    found = moe.grouped_matmul(x_RX=x_codes, weight_EXY=codes, counts_E=counts.to(npu().device),
                               scale_EY=scale.to(npu().device), row_scale_R=x_scale, output_dtype=dtype)
    rows = (x_codes.cpu().double() * x_scale.cpu().double()[:, None]).split(counts.tolist())
    weights = codes.cpu().double() * scale.double()[:, None]
    assert_near(found, torch.cat([part @ w for part, w in zip(rows, weights)]))


@pytest.mark.parametrize("counts", [[4, 0, 7, 2], [13]], ids=str)
def test_a_gated_product_and_its_codes(counts: list[int]) -> None:
    """A code is off by half at most, and by what float32 does before."""
    x_codes, x_scale = linear.dynamic_quant(x=randn(13, D, dtype=torch.bfloat16))
    codes, scale = (torch.stack(parts) for parts in zip(*(
        quantize_rows(torch.randn(2 * F, D) * D**-0.5, "w8a8") for _ in counts)))
    weight = cast_format(x=codes.transpose(1, 2).contiguous().to(npu().device), acl_format=FRACTAL_NZ)
    experts = moe.StackedExperts(weight, scale.to(npu().device), is_joined=True)
    found, found_scale = moe.swiglu_quant(x_RX=x_codes, scale_R=x_scale, experts=experts,
                                          counts_E=torch.tensor(counts).to(npu().device))
    rows = (x_codes.cpu().double() * x_scale.cpu().double()[:, None]).split(counts)
    gate, up = torch.cat([part @ (w.double() * s.double()[:, None]).T for part, w, s in zip(rows, codes, scale)]).chunk(
        2, dim=1)
    truth = torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(found_scale.cpu().double(), truth.abs().amax(1) / 127, rtol=1e-5, atol=0)
    assert found.shape == (13, F) and found.dtype is torch.int8
    assert ((truth / found_scale.cpu().double()[:, None] - found.cpu().double()).abs() <= 0.501).all()
