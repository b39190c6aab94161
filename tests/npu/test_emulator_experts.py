"""What the references of mixtures of experts compute and refuse, each held against another way to say it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_npu
from torch import Tensor

from tests.npu import op_samples
from tests.npu.op_samples import BF16, rand, routing

npu = torch.ops.npu


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(1)


def close(given: Tensor, expected: Tensor, tolerance: float = 8e-3) -> None:
    torch.testing.assert_close(given.double(), expected.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("row_idx_type", [0, 1])
def test_a_mixture_of_experts_from_end_to_end(row_idx_type: int) -> None:
    (x, experts), given = routing(row_idx_type=row_idx_type)
    weights, probs = rand(6, 32, 16, dtype=BF16), torch.rand(4, 2).to(BF16)
    rows, index, counts, _ = npu.npu_moe_init_routing_v2(x, experts, **given)
    assert counts.tolist() == torch.bincount(experts.flatten(), minlength=6).tolist()
    out = npu.npu_grouped_matmul([rows], [weights], group_list=counts, group_list_type=1, split_item=2, group_type=0)[0]
    index = index if row_idx_type == 0 else index.long().argsort().int()
    result = npu.npu_moe_token_unpermute(out, index, probs)
    for token in range(4):
        expected = sum(
            probs[token, j].double() * (x[token].double() @ weights[int(experts[token, j])].double()) for j in range(2)
        )
        close(result[token], expected, 3e-2)


def test_rows_of_other_ranks_are_undefined() -> None:
    (x, experts), given = routing(active_expert_range=[2, 5])
    rows, index, counts, scales = npu.npu_moe_init_routing_v2(x, experts, **given)
    active = (experts >= 2) & (experts < 5)
    assert counts.tolist() == [1, 1, 3] and int((index >= 0).sum()) == int(active.sum()) == 5
    assert rows[5:].isnan().all() and scales.isnan().all()
    flat = active.flatten()
    assert torch.equal(rows[index[flat].long()], x.repeat_interleave(2, 0)[flat])


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_three_ways_to_say_groups(kind: int) -> None:
    x, weights = rand(5, 32, dtype=BF16), rand(3, 32, 16, dtype=BF16)
    groups = {0: [3, 3, 5], 1: [3, 0, 2], 2: [[0, 3], [2, 2], [0, 0]]}[kind]
    out = npu.npu_grouped_matmul(
        [x], [weights], group_list=torch.tensor(groups), group_list_type=kind, split_item=3, group_type=0
    )[0]
    expected = torch.cat((x[:3].double() @ weights[0].double(), x[3:].double() @ weights[2].double()))
    close(out, expected, 2e-2)


def test_experts_of_int8_beside_plain_rows() -> None:
    (rows, codes), given = op_samples.weight_only_experts()
    out = npu.npu_grouped_matmul(rows, codes, **given)[0]
    scale, offset = (given[f"antiquant_{part}"][0].double()[:, None] for part in ("scale", "offset"))
    weights = (codes[0].double() + offset) * scale
    close(out, torch.cat((rows[0][:3].double() @ weights[0], rows[0][3:].double() @ weights[2])), 2e-2)


@pytest.mark.parametrize(("message", "sample", "change"), [
    ("antiquant parts", op_samples.weight_only_experts, {"antiquant_offset": None}),
    ("antiquant parts", op_samples.weight_only_experts, {"antiquant_scale": [torch.ones(3, 48)]}),
    ("by torch.int8", op_samples.weight_only_experts, {"antiquant_scale": None, "antiquant_offset": None}),
    ("scale torch.float32 for a result of torch.bfloat16", op_samples.int8_experts, {"scale": [torch.ones(3, 48)]}),
    ("scale torch.bfloat16 for a result of torch.float16", op_samples.int8_experts, {"output_dtype": torch.float16}),
    ("scale torch.bfloat16 for a result of torch.int8", op_samples.int8_experts, {"output_dtype": None}),
])
def test_what_a_grouped_product_refuses(message: str, sample: Callable[[], Any], change: dict[str, Any]) -> None:
    args, given = sample()
    with pytest.raises(RuntimeError, match=message):
        npu.npu_grouped_matmul(*args, **{**given, **change})


def test_a_count_of_one_group_is_refused_and_its_sum_is_taken() -> None:
    x, weights, total = rand(5, 32, dtype=BF16), rand(1, 32, 16, dtype=BF16), torch.tensor([5])
    given = {"group_list": total, "split_item": 2, "group_type": 0}
    with pytest.raises(RuntimeError, match="of kind 1 for 1 experts"):
        npu.npu_grouped_matmul([x], [weights], group_list_type=1, **given)
    close(npu.npu_grouped_matmul([x], [weights], group_list_type=0, **given)[0], x.double() @ weights[0].double(), 2e-2)


@pytest.mark.parametrize(("kind", "groups"), [(1, [3, 0, 2]), (0, [3, 3, 5])])
def test_a_gated_product_and_its_codes(kind: int, groups: list[int]) -> None:
    """By its formula, number by number; the third row is zeros and the fifth has a scale that is not a number."""
    (x, (codes,), (scale,), x_scale, _), _ = op_samples.gated_experts()
    x[2], x_scale[4] = 0, float("nan")
    found, found_scale = npu.npu_grouped_matmul_swiglu_quant_v2(
        x, [codes], [scale], x_scale, torch.tensor(groups), group_list_type=kind)
    assert (found.dtype, found_scale.dtype, found.shape) == (torch.int8, torch.float32, (5, 32))
    for row, expert in enumerate([0, 0, 0, 2, 2]):
        sums = x[row].long() @ codes[expert].long()
        numbers = sums.double() * float(x_scale[row]) * scale[expert].double()
        gated = [a / (1 + math.exp(-a)) * b for a, b in zip(numbers[:32].tolist(), numbers[32:].tolist())]
        largest = max(map(abs, gated))
        torch.testing.assert_close(float(found_scale[row]), largest / 127, rtol=1e-5, atol=0, equal_nan=True)
        if row in (2, 4):
            assert found[row].tolist() == [-128] * 32  # 0 / 0: nothing may count on them
            continue
        for code, number in zip(found[row].tolist(), gated):
            assert abs(code - number / largest * 127) <= 0.5 + 1e-3
    assert float(found_scale[2]) == 0


def test_rows_of_no_group_are_not_written() -> None:
    args, given = op_samples.gated_experts()
    codes, scale = npu.npu_grouped_matmul_swiglu_quant_v2(*args[:4], torch.tensor([1, 0, 2]), **given)
    assert scale[3:].isnan().all() and (codes[3:] == -128).all() and scale[:3].isfinite().all()


@pytest.mark.parametrize(("place", "value"), [
    (0, op_samples.int8(0, 32)), (0, op_samples.int8(5, 48)), (0, rand(5, 32)), (1, [op_samples.int8(3, 32, 48)]),
    (1, [op_samples.int8(3, 32, 64)] * 2), (1, [rand(3, 32, 64)]), (2, [torch.ones(3, 32)]),
    (2, [torch.ones(3, 64).double()]), (2, [torch.ones(64)]), (3, torch.ones(4)), (3, torch.ones(5).half()),
    (4, torch.tensor([3, 0, 2], dtype=torch.int32)), (4, torch.tensor([2, 1, 1, 1])), (4, torch.tensor([3, 0, 3])),
    (4, torch.tensor([3, -1, 2])),
], ids=lambda value: str(value) if isinstance(value, int) else None)
def test_what_a_gated_product_refuses(place: int, value: Any) -> None:
    args, given = op_samples.gated_experts()
    with pytest.raises(RuntimeError, match="npu_grouped_matmul_swiglu_quant_v2: "):
        npu.npu_grouped_matmul_swiglu_quant_v2(*args[:place], value, *args[place + 1:], **given)


@pytest.mark.parametrize(("inputs", "outputs"), [(24, 64), (16, 10272), (65536, 32)])
def test_shapes_that_a_gated_product_refuses(inputs: int, outputs: int) -> None:
    args, given = op_samples.gated_experts()
    x, weight, scale = (torch.zeros(*size, dtype=torch.int8)
                        for size in ((5, inputs), (3, inputs, outputs), (3, outputs)))
    with pytest.raises(RuntimeError, match=rf"\(5, {inputs}\) by \(3, {inputs}, {outputs}\)"):
        npu.npu_grouped_matmul_swiglu_quant_v2(x, [weight], [scale.float()], *args[3:], **given)


def test_a_gated_product_takes_fractals_alone() -> None:
    args, given = op_samples.gated_experts()
    x, (weight,), (scale,), x_scale, counts = ([y.npu() for y in x] if isinstance(x, list) else x.npu() for x in args)
    with pytest.raises(RuntimeError, match="does not lie in FRACTAL_NZ"):
        npu.npu_grouped_matmul_swiglu_quant_v2(x, [weight], [scale], x_scale, counts, **given)
    tiled = torch_npu.npu_format_cast(weight, 29)
    codes, _ = npu.npu_grouped_matmul_swiglu_quant_v2(x, [tiled], [scale], x_scale, counts, **given)
    assert torch.equal(codes.cpu(), npu.npu_grouped_matmul_swiglu_quant_v2(*args, **given)[0])


@pytest.mark.parametrize("given", [{"smooth_scale": torch.ones(3, 32)}, {"dequant_mode": 1}, {"quant_mode": 1},
                                   {"quant_dtype": 2}, {"dequant_dtype": 5}, {"bias": torch.ones(3, 64)}], ids=str)
def test_forms_of_a_gated_product_that_are_not_emulated(given: dict[str, Any]) -> None:
    args, plain = op_samples.gated_experts()
    with pytest.raises(NotImplementedError, match=f"{next(iter(given))}="):
        npu.npu_grouped_matmul_swiglu_quant_v2(*args, **plain, **given)


def test_choosing_experts_by_group() -> None:
    scores, bias = rand(4, 64), rand(64)
    weights, experts, norm = npu.npu_moe_gating_top_k(
        scores, 6, bias=bias, k_group=2, group_count=4, group_select_mode=1, norm_type=1, routed_scaling_factor=2.5
    )
    for row in range(4):
        sigmoid = scores[row].sigmoid()
        biased = (sigmoid + bias).view(4, 16)
        best = biased.topk(2, -1).values.sum(-1).topk(2).indices
        allowed = [i for i in range(64) if i // 16 in best.tolist()]
        wanted = sorted(allowed, key=lambda i: -float(biased.flatten()[i]))[:6]
        assert experts[row].tolist() == wanted
        close(weights[row], sigmoid[wanted] / sigmoid[wanted].sum() * 2.5, 1e-5)
        close(norm[row], sigmoid, 1e-6)


@pytest.mark.parametrize(("num_rows", "num_experts", "given"), [
    (0, 8, {}), (1, 2, {}), (1, 8, {"group_count": 4}), (1, 9, {"group_count": 2}), (1, 2049, {}),
    (1, 195, {"group_count": 65}), (1, 8, {"group_count": 2, "k_group": 3}), (1, 8, {"k": 9}), (1, 8, {"k": 0}),
], ids=str)
def test_what_gating_refuses(num_rows: int, num_experts: int, given: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match=r"npu_moe_gating_top_k: (k .* experts in|x is empty)"):
        npu.npu_moe_gating_top_k(rand(num_rows, num_experts), **{"k": 1, **given})


@pytest.mark.parametrize("norm_type", [0, 1])
def test_what_is_chosen_among_nan_does_not_exist(norm_type: int) -> None:
    scores = rand(3, 8)
    scores[1, 4] = float("nan")
    weights, experts, norm = npu.npu_moe_gating_top_k(scores, 2, norm_type=norm_type)
    assert experts[1].tolist() == [8, 8] and norm[1].isnan().any() and not norm[[0, 2]].isnan().any()
    assert int(experts[[0, 2]].max()) < 8 and weights[[0, 2]].isfinite().all()


def test_softmax_gating_counts_rows_by_column() -> None:
    scores = rand(4, 8)
    weights, experts, rows = torch_npu.npu_moe_gating_top_k_softmax(scores, None, 2)
    assert torch.equal(weights, scores.softmax(-1).topk(2, -1).values) and experts.dtype is torch.int32
    assert rows.tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]
