"""`route`, `grouped_linear` and `combine` against float64, and against plain loops; what they read."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import product

import pytest
import torch
from torch import Tensor

from backends.cpu.expert_kernels import PanelExperts
from backends.expert_choice import ExpertChoice, RouteRule
from backends.opset import OpSet
from benchmarks.pages_read import watch_experts
from tests.ops.conftest import NAN, sizes
from tests.ops.test_linear import stored_weight

RULES = {
    "softmax": RouteRule(num_chosen=2),
    "qwen3": RouteRule(num_chosen=8, renormalise=True),
    "one": RouteRule(num_chosen=1, scale=2.5),
    "deepseek-v2": RouteRule(num_chosen=6, num_groups=8, num_kept_groups=3, scale=16.0),
    "deepseek-v3": RouteRule(num_chosen=8, sigmoid=True, num_groups=8, num_kept_groups=4, summed_per_group=2,
                             renormalise=True, scale=2.5),
    "all": RouteRule(num_chosen=40, sigmoid=True, renormalise=True),
}
NUM_EXPERTS = 40
ROWS = sizes([0, 1, 2, 5, 13, 40, 200], [1, 13])
SIZES = sizes([(33, 7), (100, 64), (31, 530), (129, 70)], [(33, 70)])
QUANTIZATIONS = [None, "int8", "fp8", "w8a8"]


def truth(logits_E: Tensor, rule: RouteRule, bias_E: Tensor | None) -> list[tuple[int, float]]:
    """(expert, weight) of one token, in Python."""
    scores = (logits_E.double().sigmoid() if rule.sigmoid else logits_E.double().softmax(0)).tolist()
    wanted = [score + (0.0 if bias_E is None else float(bias_E[e])) for e, score in enumerate(scores)]
    width = len(scores) // rule.num_groups
    merit = [sum(sorted(wanted[g * width:(g + 1) * width], reverse=True)[:rule.summed_per_group])
             for g in range(rule.num_groups)]
    kept = sorted(range(rule.num_groups), key=lambda g: -merit[g])[:rule.num_kept_groups]
    allowed = [e for e in range(len(scores)) if e // width in kept]
    chosen = sorted(allowed, key=lambda e: -wanted[e])[:rule.num_chosen]
    total = sum(scores[e] for e in chosen) if rule.renormalise else 1.0
    return [(e, scores[e] / total * rule.scale) for e in chosen]


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "plain"])
def test_route(ops: OpSet, name: str, with_bias: bool) -> None:
    rule, bias_E = RULES[name], torch.randn(NUM_EXPERTS) * 0.2 if with_bias else None
    num_tokens, = sizes([17], [5])
    logits_TE = torch.randn(num_tokens, NUM_EXPERTS) * 2
    choice = ops.route(logits_TE, rule, bias_E)
    assert (choice.ids_TK.dtype, choice.weights_TK.dtype) == (torch.int32, torch.float32)
    assert choice.ids_TK.shape == choice.weights_TK.shape == (num_tokens, rule.num_chosen)
    for t, logits_E in enumerate(logits_TE):
        expected = truth(logits_E, rule, bias_E)
        assert choice.ids_TK[t].tolist() == [expert for expert, _ in expected]
        weights = torch.tensor([weight for _, weight in expected])
        torch.testing.assert_close(choice.weights_TK[t], weights, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("num_rows", [0, 1])
def test_few_tokens_are_routed(ops: OpSet, num_rows: int) -> None:
    choice = ops.route(torch.randn(num_rows, 3), RouteRule(num_chosen=2))
    assert choice.ids_TK.shape == choice.weights_TK.shape == (num_rows, 2)


@pytest.mark.parametrize("sigmoid", [False, True])
def test_the_first_of_equals_is_chosen(ops: OpSet, sigmoid: bool) -> None:
    rule = RouteRule(num_chosen=3, sigmoid=sigmoid, num_groups=4, num_kept_groups=2, summed_per_group=2)
    assert ops.route(torch.zeros(2, 8), rule).ids_TK.tolist() == [[0, 1, 2]] * 2
    logits_TE = torch.tensor([[0.0, 1, 1, 0, 1, 1, 0, 0]])
    assert ops.route(logits_TE, rule).ids_TK.tolist() == [[1, 4, 5]]


def test_scores_that_are_zero_give_weights_of_zero(ops: OpSet) -> None:
    rule = RouteRule(num_chosen=2, sigmoid=True, renormalise=True)
    choice = ops.route(torch.full((1, 4), -200.0), rule, torch.tensor([0.0, 0, 1, 0]))
    assert choice.ids_TK.tolist() == [[2, 0]] and choice.weights_TK.abs().max() < 1e-6


@pytest.mark.parametrize(("bad", "sigmoid"), [(NAN, False), (NAN, True), (float("inf"), False)], ids=str)
def test_what_is_not_a_number_stays_in_its_row(ops: OpSet, bad: float, sigmoid: bool) -> None:
    rule = RouteRule(num_chosen=4, sigmoid=sigmoid, num_groups=5, num_kept_groups=2, renormalise=True)
    logits_TE = torch.randn(3, 20)
    good = ops.route(logits_TE, rule)
    logits_TE[1, 7] = bad
    choice = ops.route(logits_TE, rule)
    assert choice.weights_TK[1].isnan().all()
    assert len(set(choice.ids_TK[1].tolist())) == 4 and set(choice.ids_TK[1].tolist()) <= set(range(20))
    for t in (0, 2):
        assert torch.equal(choice.ids_TK[t], good.ids_TK[t]) and torch.equal(choice.weights_TK[t], good.weights_TK[t])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_route_in_half_precision(ops: OpSet, dtype: torch.dtype) -> None:
    """Scores are fp32's."""
    logits_TE = torch.randn(9, NUM_EXPERTS).to(dtype)
    found, expected = (ops.route(logits, RULES["qwen3"]) for logits in (logits_TE, logits_TE.float()))
    assert torch.equal(found.ids_TK, expected.ids_TK) and torch.equal(found.weights_TK, expected.weights_TK)


def chosen(num_tokens: int, num_experts: int, num_chosen: int) -> ExpertChoice:
    """Some experts are not hit, and some by all tokens."""
    liking_TE = torch.rand(num_tokens, num_experts)
    liking_TE[:, 0] = 2.0
    liking_TE[:, 1] = -1.0
    ids_TK = liking_TE.sort(dim=1, descending=True).indices[:, :num_chosen].int().contiguous()
    return ExpertChoice(ids_TK, torch.rand(num_tokens, num_chosen))


def experts(num_experts: int, size: tuple[int, int]) -> tuple[Tensor, ...]:
    return tuple(torch.randn(size) / size[1] ** 0.5 for _ in range(num_experts))


def token_rows(y_RY: Tensor, ops: OpSet, choice: ExpertChoice) -> Tensor:
    """Rows in the order of tokens and choices, [T, K, Y], by way of `combine` alone: its order is the op set's own."""
    ones = torch.eye(choice.ids_TK.shape[1])
    rows = [ops.combine(y_RY, ExpertChoice(choice.ids_TK, one.expand_as(choice.weights_TK).contiguous(), choice.order))
            for one in ones]
    return torch.stack(rows, dim=1)


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("num_rows", ROWS)
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_each_row_is_what_its_expert_makes_of_it(ops: OpSet, size: tuple[int, int], num_rows: int,
                                                 quantization: str | None) -> None:
    """Twice, as in an mlp: from tokens, then from rows; a row is `linear`'s of the expert alone."""
    num_experts, num_chosen = 9, 3
    weights, back = experts(num_experts, size), experts(num_experts, (21, size[0]))
    choice, x_TX = chosen(num_rows, num_experts, num_chosen), torch.randn(num_rows, size[1])
    packed = [ops.pack_experts(w, quantization=quantization) for w in (weights, back)]
    y_RY = ops.grouped_linear(x_TX, packed[0], choice, from_tokens=True)
    z_RZ = ops.grouped_linear(y_RY.clone().tanh_(), packed[1], choice, from_tokens=False)
    assert y_RY.shape == (num_rows * num_chosen, size[0]) and z_RZ.shape == (num_rows * num_chosen, 21)
    y_TKY, z_TKZ = (token_rows(rows, ops, choice) for rows in (y_RY, z_RZ))
    for expert in range(num_experts):
        t, k = (choice.ids_TK == expert).nonzero(as_tuple=True)
        alone = [ops.pack_linear(w[expert], quantization=quantization) for w in (weights, back)]
        expected_y = ops.linear(x_TX[t], alone[0])
        torch.testing.assert_close(y_TKY[t, k], expected_y, rtol=0, atol=1e-5)
        torch.testing.assert_close(z_TKZ[t, k], ops.linear(y_TKY[t, k].tanh(), alone[1]), rtol=0, atol=1e-5)
        if quantization is None:
            torch.testing.assert_close(expected_y.double(), x_TX[t].double() @ weights[expert].double().T, rtol=0,
                                       atol=1e-5)


@pytest.mark.parametrize("num_chosen", [1, 4])
@pytest.mark.parametrize("num_rows", [0, 1, 7, 50])
def test_combine(ops: OpSet, num_rows: int, num_chosen: int) -> None:
    """Tokens get back what their experts made, by its weight."""
    size, weights = (19, 13), experts(6, (19, 13))
    choice, x_TX = chosen(num_rows, 6, num_chosen), torch.randn(num_rows, size[1])
    y_RY = ops.grouped_linear(x_TX, ops.pack_experts(weights), choice, from_tokens=True)
    found_TY, expected_TY = ops.combine(y_RY, choice), torch.zeros(num_rows, size[0], dtype=torch.float64)
    for t, k in product(range(num_rows), range(num_chosen)):
        weight_YX = weights[int(choice.ids_TK[t, k])].double()
        expected_TY[t] += float(choice.weights_TK[t, k]) * (weight_YX @ x_TX[t].double())
    assert found_TY.shape == expected_TY.shape
    torch.testing.assert_close(found_TY.double(), expected_TY, rtol=0, atol=1e-5)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_experts_that_nobody_chose_are_not_read(ops: OpSet, quantization: str | None) -> None:
    weights = experts(5, (34, 40))
    for unread in (0, 2, 4):
        weights[unread].fill_(NAN)
    ids_TK = torch.tensor([[1, 3], [3, 1], [1, 3]], dtype=torch.int32)
    choice, x_TX = ExpertChoice(ids_TK, torch.ones(3, 2)), torch.randn(3, 40)
    y_RY = ops.grouped_linear(x_TX, ops.pack_experts(weights, quantization=quantization), choice, from_tokens=True)
    assert y_RY.isfinite().all() and ops.combine(y_RY, choice).isfinite().all()


@pytest.mark.skipif(sys.platform != "linux", reason="it asks Linux which pages are in memory")
@pytest.mark.parametrize("num_tokens", [1, 3, 8, 64])
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_bytes_read_are_those_of_the_experts_that_were_hit(op_sets: dict[str, OpSet], num_tokens: int,
                                                           quantization: str | None) -> None:
    """Counted by pages: an expert is one to four, all of which are read once it is hit."""
    if "compiled" not in op_sets:
        pytest.skip("no C compiler here, or Triton's turn")
    ops, num_experts, size = op_sets["compiled"], 64, (64, 64)
    packed = ops.pack_experts(experts(num_experts, size), quantization=quantization)
    assert type(packed) is PanelExperts
    watched, choice = watch_experts(packed), ops.route(torch.randn(num_tokens, num_experts), RULES["qwen3"])
    ops.grouped_linear(torch.randn(num_tokens, size[1]), packed, choice, from_tokens=True)
    hit, pages = choice.ids_TK.unique().tolist(), torch.tensor(watched.pages()).view(num_experts, -1)
    assert pages.all(1).nonzero().flatten().tolist() == pages.any(1).nonzero().flatten().tolist() == hit
    assert watched.num_bytes() == len(hit) * packed.nbytes // num_experts - (256 * len(hit) if quantization else 0)
    watched.forget()
    assert watched.num_bytes() == 0


@pytest.mark.parametrize("quantization", [None, "w8a8"])
def test_a_token_does_not_see_its_batch(ops: OpSet, quantization: str | None) -> None:
    weights, choice, x_TX = experts(7, (50, 90)), chosen(60, 7, 2), torch.randn(60, 90)
    packed = ops.pack_experts(weights, quantization=quantization)

    def outputs(begin: int, end: int) -> Tensor:
        part = ExpertChoice(choice.ids_TK[begin:end].contiguous(), choice.weights_TK[begin:end].contiguous())
        return ops.combine(ops.grouped_linear(x_TX[begin:end], packed, part, from_tokens=True), part)

    together = outputs(0, 60)
    for begin, end in ((0, 1), (3, 5), (20, 33), (59, 60)):
        torch.testing.assert_close(outputs(begin, end), together[begin:end], rtol=0, atol=1e-5)
        if quantization == "w8a8" or type(packed) is PanelExperts:
            assert torch.equal(outputs(begin, end), together[begin:end])


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_experts_in_half_precision(ops: OpSet, dtype: torch.dtype, quantization: str | None) -> None:
    weights = tuple(w.to(dtype) for w in experts(4, (48, 64)))
    choice, x_TX = chosen(11, 4, 2), torch.randn(11, 64).to(dtype)
    y_RY = ops.grouped_linear(x_TX, ops.pack_experts(weights, quantization=quantization), choice, from_tokens=True)
    out_TY = ops.combine(y_RY, choice)
    assert y_RY.dtype is out_TY.dtype is dtype
    exact = [stored_weight(w.float(), None if quantization == "w8a8" else quantization) for w in weights]
    y_TKY = torch.stack([exact[e] @ x_TX[t].double() for t, ids in enumerate(choice.ids_TK.tolist())
                         for e in ids]).unflatten(0, (11, 2))
    expected_TY = (y_TKY * choice.weights_TK[:, :, None]).sum(1)
    torch.testing.assert_close(out_TY.double(), expected_TY, rtol=0, atol=0.08)


def test_threads_give_the_same_bits(ops: OpSet) -> None:
    (size, num_tokens), = sizes([((300, 200), 40)], [((30, 20), 5)])
    weights, choice, x_TX = experts(16, size), chosen(num_tokens, 16, 4), torch.randn(num_tokens, size[1])
    for quantization in (None, "w8a8"):
        packed = ops.pack_experts(weights, quantization=quantization)
        torch.set_num_threads(1)
        alone = ops.combine(ops.grouped_linear(x_TX, packed, choice, from_tokens=True), choice)
        torch.set_num_threads(2)
        found = ops.combine(ops.grouped_linear(x_TX, packed, choice, from_tokens=True), choice)
        assert torch.equal(found, alone) or (quantization is None and type(packed) is not PanelExperts)


def test_packed_experts_take_what_linear_layers_do(ops: OpSet) -> None:
    weights = experts(3, (32, 64))
    packed = ops.pack_experts(weights, quantization="int8")
    assert packed.nbytes == sum(ops.pack_linear(w, quantization="int8").nbytes for w in weights)
    with pytest.raises(ValueError, match="int4"):
        ops.pack_experts(weights, quantization="int4")


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_a_gated_product_is_two_operators(ops: OpSet, quantization: str | None) -> None:
    """The bits of one after the other."""
    weights, choice, x_TX = experts(9, (2 * 35, 64)), chosen(13, 9, 3), torch.randn(13, 64)
    packed, gated = (pack(weights, quantization=quantization) for pack in (ops.pack_experts, ops.pack_gated_experts))
    found_RF = ops.gated_grouped_linear(x_TX, gated, choice)
    assert torch.equal(found_RF, ops.silu_mul(ops.grouped_linear(x_TX, packed, choice, from_tokens=True)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_results_go_into_memory_of_the_caller(ops: OpSet, dtype: torch.dtype, quantization: str | None) -> None:
    """The bits of a result of its own, over whatever was there."""
    num_tokens, num_chosen, (width, size) = 21, 2, (34, 48)
    stacked = experts(5, (2 * width, size))
    up, down = (ops.pack_experts([w.to(dtype) for w in each], quantization=quantization)
                for each in (stacked, experts(5, (size, width))))
    gated = ops.pack_gated_experts([w.to(dtype) for w in stacked], quantization=quantization)
    choice, x_TX = chosen(num_tokens, 5, num_chosen), torch.randn(num_tokens, size).to(dtype)
    rows = num_tokens * num_chosen
    rooms = [torch.full(shape, NAN, dtype=dtype) for shape in ((rows, 2 * width), (rows, width), (rows, size),
                                                               (num_tokens, size))]

    def results(outs: Sequence[Tensor | None]) -> Iterator[Tensor]:
        yield ops.grouped_linear(x_TX, up, choice, from_tokens=True, out=outs[0])
        yield (y := ops.gated_grouped_linear(x_TX, gated, choice, room=outs[0], out=outs[1]))
        yield (y := ops.grouped_linear(y, down, choice, from_tokens=False, out=outs[2]))
        yield ops.combine(y, choice, out=outs[3])

    for own, found, room in zip(results([None] * 4), results(rooms), rooms, strict=True):
        assert found.data_ptr() == room.data_ptr() != own.data_ptr() and torch.equal(found, own)
