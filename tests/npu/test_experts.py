"""Mixtures of experts: the contracts of `route`, `grouped_linear` and `combine`, and the way they are called."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from backends.expert_choice import ExpertChoice, RouteRule
from backends.npu_experts import gating_knows
from backends.opset import OpSet
from npu_ops import moe
from npu_ops.format import FRACTAL_NZ, format_of
from tests.npu.device import HALVES, assert_near, host_ops, npu, randn
from tests.ops import test_experts as contract
from tests.ops.test_experts import (  # noqa: F401  the same tests, on this device
    test_combine,
    test_few_tokens_are_routed,
    test_route,
    test_route_in_half_precision,
    test_scores_that_are_zero_give_weights_of_zero,
    test_the_first_of_equals_is_chosen,
    test_what_is_not_a_number_stays_in_its_row,
)
from xllm.layers.layer_context import LayerContext
from xllm.layers.linear import with_common_scale
from xllm.parallel.parallel_context import ParallelContext

QUANTIZATIONS = [None, "int8", "w8a8"]
# Those of whole tiles lie in FRACTAL_NZ with w8a8; X is what the experts take, Y what they give.
SIZES = [(96, 64), (40, 33)]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def ops() -> OpSet:
    return host_ops()


@pytest.fixture
def gating_calls() -> Iterator[mock.Mock]:
    with mock.patch.object(moe, "gating", wraps=moe.gating) as calls:
        yield calls


def there(choice: ExpertChoice) -> ExpertChoice:
    return ExpertChoice(choice.ids_TK.to(npu().device), choice.weights_TK.to(npu().device))


@pytest.mark.parametrize("name", contract.RULES)
def test_rules_of_models_are_one_operator(name: str, gating_calls: mock.Mock) -> None:
    rule = contract.RULES[name]
    npu().ops.route(randn(3, contract.NUM_EXPERTS, dtype=torch.bfloat16), rule)
    assert gating_calls.call_count == 1


@pytest.mark.parametrize(("rule", "num_experts"), [
    (RouteRule(num_chosen=2, num_groups=3, num_kept_groups=2), 6),
    (RouteRule(num_chosen=3, num_groups=2, num_kept_groups=1, summed_per_group=3, sigmoid=True), 8),
    (RouteRule(num_chosen=2, renormalise=True), 2),
    (RouteRule(num_chosen=2), 2049),
    (RouteRule(num_chosen=2, num_groups=70), 210),  # each padded to 32
    (RouteRule(num_chosen=1, renormalise=True, scale=3.0), 1),
    (RouteRule(num_chosen=1, sigmoid=True), 1),
], ids=str)
def test_rules_that_the_operator_does_not_know(rule: RouteRule, num_experts: int, ops: OpSet,
                                               gating_calls: mock.Mock) -> None:
    """They are honoured by plain torch, on the device."""
    logits_TE, bias_E = torch.randn(5, num_experts), torch.randn(num_experts) * 0.1
    logits_TE[3, 0] = float("nan")
    choice = ops.route(logits_TE, rule, bias_E)
    assert not gating_knows(rule, num_experts) and not gating_calls.called
    for t in (0, 1, 2, 4):
        expected = contract.truth(logits_TE[t], rule, bias_E)
        assert choice.ids_TK[t].tolist() == [expert for expert, _ in expected]
        torch.testing.assert_close(choice.weights_TK[t], torch.tensor([weight for _, weight in expected]))
    assert choice.weights_TK[3].isnan().all() and choice.ids_TK.dtype is torch.int32


def test_sigmoids_that_are_not_divided_by_their_sum(ops: OpSet, gating_calls: mock.Mock) -> None:
    """The operator divides them; what is wanted are its scores."""
    rule, logits_TE = RouteRule(num_chosen=3, sigmoid=True, scale=1.5), torch.randn(6, 9)
    logits_TE[2, 5] = float("nan")
    choice = ops.route(logits_TE, rule)
    assert gating_calls.call_count == 1
    expected_TK = logits_TE.sigmoid().gather(1, choice.ids_TK.long()) * 1.5
    expected_TK[2] = float("nan")
    torch.testing.assert_close(choice.weights_TK, expected_TK, equal_nan=True)


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("num_rows", [0, 1, 13, 60])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_each_row_is_what_its_expert_makes_of_it(quantization: str | None, dtype: torch.dtype, num_rows: int,
                                                 size: tuple[int, int]) -> None:
    """From tokens, then from rows; the truth is `linear` of the expert alone. With bfloat16 the scales of w8a8 are
    rounded to it, once an expert's rows are multiplied together."""
    ops, num_experts, num_chosen = npu().ops, 7, 3
    weights, back = (tuple(randn(*shape, dtype=dtype) * shape[1]**-0.5 for _ in range(num_experts))
                     for shape in (size, (64, size[0])))
    choice, x_TX = there(contract.chosen(num_rows, num_experts, num_chosen)), randn(num_rows, size[1], dtype=dtype)
    packed = [ops.pack_experts(iter(each), quantization=quantization) for each in (weights, back)]
    is_tiled = quantization == "w8a8" and size == (96, 64)
    assert (format_of(packed[0].weight_EXY) == FRACTAL_NZ) == is_tiled
    y_RY = ops.grouped_linear(x_TX, packed[0], choice, from_tokens=True)
    z_RZ = ops.grouped_linear(y_RY, packed[1], choice, from_tokens=False)
    assert y_RY.shape == (num_rows * num_chosen, size[0]) and y_RY.dtype is z_RZ.dtype is dtype
    if not num_rows:
        assert ops.combine(z_RZ, choice).shape == (0, 64)
        return
    places = choice.order.row_of_R.cpu().view(num_rows, num_chosen).long()
    ids_TK, rounding = choice.ids_TK.cpu(), 8.0 if quantization == "w8a8" else 3.0
    for expert in range(num_experts):
        t, k = (ids_TK == expert).nonzero(as_tuple=True)
        if not len(t):
            continue
        alone = [ops.pack_linear(each[expert], quantization=quantization) for each in (weights, back)]
        rows = places[t, k].to(npu().device)
        assert_near(y_RY[rows], ops.linear(x_TX[t.to(npu().device)], alone[0]), roundings=rounding)
        assert_near(z_RZ[rows], ops.linear(y_RY[rows], alone[1]), roundings=rounding)
    out_TZ = ops.combine(z_RZ, choice)
    assert_near(out_TZ, (z_RZ.cpu().double()[places] * choice.weights_TK.cpu().double()[..., None]).sum(1))


# Whether gate and up are joined with what follows: whole tiles, of not too many outputs.
GATED = {(48, 64): True, (40, 64): False, (48, 40): False, (5120, 16): True, (5136, 16): False}


@pytest.mark.parametrize("size", GATED, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("num_experts", [4, 1])
def test_gated_experts_of_codes(num_experts: int, dtype: torch.dtype, size: tuple[int, int]) -> None:
    """A layer's result is as near to that of plain numbers with either way, and of rows as of tokens."""
    ops, (width, hidden), num_tokens, num_chosen = npu().ops, size, 9, min(num_experts, 2)
    gate_up, down = ([(torch.randn(shape) * shape[1]**-0.5).to(dtype) for _ in range(num_experts)]
                     for shape in ((2 * width, hidden), (hidden, width)))
    x_TD, choice = torch.randn(num_tokens, hidden).to(dtype), contract.chosen(num_tokens, 4, num_chosen)
    choice.ids_TK %= num_experts
    there_TD, moved = x_TD.to(npu().device), there(choice)
    packed = ops.pack_gated_experts(iter(each.to(npu().device) for each in gate_up), quantization="w8a8")
    back = ops.pack_experts(iter(each.to(npu().device) for each in down), quantization="w8a8")
    assert packed.is_joined == GATED[size] == (type(ops.gated_grouped_linear(there_TD, packed, moved)) is moe.CodedRows)
    assert (format_of(packed.weight_EXY) == FRACTAL_NZ) == (size[0] != 40 and hidden != 40)

    def layer(begin: int, end: int) -> Tensor:
        part = there(ExpertChoice(choice.ids_TK[begin:end].contiguous(), choice.weights_TK[begin:end].contiguous()))
        inner = ops.gated_grouped_linear(there_TD[begin:end], packed, part)
        out_TD = ops.combine(ops.grouped_linear(inner, back, part, from_tokens=False), part)
        assert out_TD.dtype is dtype and out_TD.shape == (end - begin, hidden)
        return out_TD.cpu()

    found_TD, truth_TD = layer(0, num_tokens), torch.zeros(num_tokens, hidden, dtype=torch.double)
    for t, k in product(range(num_tokens), range(num_chosen)):
        expert, weight = int(choice.ids_TK[t, k]), float(choice.weights_TK[t, k])
        gate, up = (gate_up[expert].double() @ x_TD[t].double()).chunk(2)
        truth_TD[t] += weight * (down[expert].double() @ (torch.nn.functional.silu(gate) * up))
    assert float((found_TD.double() - truth_TD).norm() / truth_TD.norm()) < 0.05
    assert torch.equal(torch.cat([layer(0, 1), layer(1, 6), layer(6, 9)]), found_TD)
    assert layer(0, 0).shape == (0, hidden)


def test_ranks_that_share_a_row_have_its_numbers() -> None:
    """Its codes are made by the largest number on all ranks, so that they are not made in the product before."""
    group: Any = SimpleNamespace(size=2)
    context = LayerContext(ops=npu().ops, device=npu().device, max_model_len=1, parallel=ParallelContext(tp=group),
                           quantization="w8a8")
    own, choice = with_common_scale(context).ops, there(contract.chosen(5, 3, 2))
    packed = own.pack_gated_experts([randn(96, 64, dtype=torch.bfloat16) for _ in range(3)], quantization="w8a8")
    inner_RF = own.gated_grouped_linear(randn(5, 64, dtype=torch.bfloat16), packed, choice)
    assert not packed.is_joined and inner_RF.shape == (10, 48) and inner_RF.dtype is torch.bfloat16


def test_rows_of_codes_that_are_zeros_or_no_numbers() -> None:
    """They stay in their rows."""
    ops, dtype = npu().ops, torch.bfloat16
    packed = ops.pack_gated_experts([randn(96, 64, dtype=dtype) for _ in range(3)], quantization="w8a8")
    back = ops.pack_experts([randn(64, 48, dtype=dtype) for _ in range(3)], quantization="w8a8")
    x_TD, choice = randn(5, 64, dtype=dtype), there(contract.chosen(5, 3, 2))
    x_TD[1], x_TD[3, 7] = 0, float("nan")
    inner = ops.gated_grouped_linear(x_TD, packed, choice)
    assert type(inner) is moe.CodedRows
    out_TD = ops.combine(ops.grouped_linear(inner, back, choice, from_tokens=False), choice)
    assert not out_TD[1].any() and out_TD[3].isnan().all() and out_TD[[0, 2, 4]].isfinite().all()


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_rows_keep_to_themselves(quantization: str | None) -> None:
    """Experts that nobody chose may be anything, and a token does not see its batch."""
    ops, ids_TK = npu().ops, torch.tensor([[1, 3], [3, 1], [1, 3], [4, 3]], dtype=torch.int32)
    weights = [randn(48, 64, dtype=torch.bfloat16) for _ in range(5)]
    weights[0].fill_(float("nan"))
    weights[2].fill_(float("nan"))
    packed, x_TX = ops.pack_experts(weights, quantization=quantization), randn(4, 64, dtype=torch.bfloat16)

    def outputs(begin: int, end: int) -> Tensor:
        choice = there(ExpertChoice(ids_TK[begin:end].contiguous(), torch.rand(4, 2)[begin:end].contiguous()))
        choice.weights_TK.fill_(0.5)
        return ops.combine(ops.grouped_linear(x_TX[begin:end], packed, choice, from_tokens=True), choice).cpu()

    together = outputs(0, 4)
    assert together.isfinite().all()
    for begin, end in ((0, 1), (1, 3), (3, 4)):
        torch.testing.assert_close(outputs(begin, end), together[begin:end], rtol=2**-8, atol=1e-3)


def test_results_go_into_memory_of_the_caller() -> None:
    ops, choice = npu().ops, there(contract.chosen(9, 4, 2))
    x_TX, dtype, device = randn(9, 64, dtype=torch.bfloat16), torch.bfloat16, npu().device
    packed = ops.pack_experts(iter([randn(96, 64, dtype=dtype) for _ in range(4)]))
    rooms = [torch.full(shape, float("nan"), dtype=dtype, device=device) for shape in ((18, 96), (18, 48), (9, 48))]
    y_RY = ops.grouped_linear(x_TX, packed, choice, from_tokens=True, out=rooms[0])
    inner_RF = ops.silu_mul(y_RY, out=rooms[1])
    found = [y_RY, inner_RF, ops.combine(inner_RF, choice, out=rooms[2])]
    assert [each.data_ptr() for each in found] == [room.data_ptr() for room in rooms]
    own = ops.silu_mul(ops.grouped_linear(x_TX, packed, choice, from_tokens=True))
    assert torch.equal(rooms[1].cpu(), own.cpu()) and torch.equal(rooms[2].cpu(), ops.combine(own, choice).cpu())


def test_an_order_is_made_where_there_is_none(ops: OpSet) -> None:
    """`host_ops` takes the order away between the operators; whoever changes the ids does."""
    weights, choice = [torch.randn(48, 64).bfloat16() for _ in range(4)], contract.chosen(9, 4, 2)
    x_TX, packed = torch.randn(9, 64).bfloat16(), ops.pack_experts(tuple(weights))
    y_RY = ops.grouped_linear(x_TX, packed, choice, from_tokens=True)
    again = ops.grouped_linear(y_RY, ops.pack_experts(tuple(torch.eye(48).bfloat16() for _ in range(4))), choice,
                               from_tokens=False)
    assert choice.order is None and torch.equal(y_RY, again)
    expected = sum(choice.weights_TK[:, k, None] * torch.stack([
        x.float() @ weights[e].float().T for x, e in zip(x_TX, choice.ids_TK[:, k].tolist())]) for k in range(2))
    torch.testing.assert_close(ops.combine(again, choice).float(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_one_expert(quantization: str | None) -> None:
    """A list of one count is not allowed."""
    ops, weight, x_TX = npu().ops, randn(48, 64, dtype=torch.float16), randn(5, 64, dtype=torch.float16)
    choice = ops.route(randn(5, 1), RouteRule(num_chosen=1))
    y_RY = ops.grouped_linear(x_TX, ops.pack_experts([weight], quantization=quantization), choice, from_tokens=True)
    assert_near(ops.combine(y_RY, choice), ops.linear(x_TX, ops.pack_linear(weight, quantization=quantization)))


def test_what_packed_experts_are() -> None:
    weights = [randn(32, 64, dtype=torch.bfloat16) for _ in range(3)]
    plain, int8, w8a8 = (npu().ops.pack_experts(weights, quantization=q) for q in QUANTIZATIONS)
    assert plain.nbytes == 3 * weights[0].nbytes and plain.weight_EXY.shape == (3, 64, 32)
    assert int8.nbytes == 3 * 32 * (64 + 2 + 2) and w8a8.nbytes == 3 * 32 * (64 + 2)
    with pytest.raises(ValueError, match="not in fp8"):
        npu().ops.pack_experts(weights, quantization="fp8")
    for number, size in ((1025, (1, 1)), (1, (65536, 1)), (1, (1, 65536))):
        with pytest.raises(ValueError, match=f"up to 1024 experts, and fewer than 65536 .*, not {number} of "):
            npu().ops.pack_experts(torch.zeros(size, dtype=torch.bfloat16) for _ in range(number))
