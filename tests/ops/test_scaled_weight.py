"""Products with matrices of fp8 that have their own scales, on the op sets that take them, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from backends.cpu.kernels import PanelLinear
from backends.expert_choice import RouteRule
from backends.opset import OpSet
from backends.scaled_weight import ScaledWeight, stack_rows
from tests.ops.conftest import sizes

# (outputs, inputs, inputs of a run): runs that are longer than the row, that divide it and that do not.
SIZES = sizes([(33, 7, 128), (100, 256, 128), (31, 530, 128), (129, 1100, 24), (1, 1, 1), (64, 700, 100)],
              [(33, 7, 128), (40, 300, 128), (31, 130, 48), (1, 1, 1), (64, 70, 20)])
ROWS = sizes([0, 1, 2, 5, 13, 70], [0, 2, 33, 70])


def scaled(num_outputs: int, num_inputs: int, group: int) -> tuple[ScaledWeight, Tensor]:
    """A weight, and what it stands for in float64. Scales are far apart."""
    codes = (torch.randn(num_outputs, num_inputs) * 100).to(torch.float8_e4m3fn)
    scales = torch.randn(num_outputs, -(-num_inputs // group)).exp() / 100 / num_inputs**0.5
    each = scales.double().repeat_interleave(group, 1)[:, :num_inputs]
    return ScaledWeight(codes, scales, group), codes.double() * each


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("num_rows", ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear(ops: OpSet, size: tuple[int, int, int], num_rows: int, dtype: torch.dtype) -> None:
    """Compiled, it has the bits of the plain matrix."""
    (weight, whole), bias_Y = scaled(*size), torch.randn(size[0]).to(dtype)
    x = torch.randn(num_rows, size[1]).to(dtype)
    packed = ops.pack_linear(weight, bias_Y)
    y = ops.linear(x, packed)
    assert y.shape == (num_rows, size[0]) and y.dtype is dtype
    most = 1e-4 if dtype is torch.float32 else 0.2
    torch.testing.assert_close(y.double(), x.double() @ whole.T + bias_Y.double(), rtol=0, atol=most)
    if type(packed) is PanelLinear and dtype is torch.float32:
        assert torch.equal(y, ops.linear(x, ops.pack_linear(weight.dequantise(dtype), bias_Y)))


def test_a_row_does_not_see_its_batch(ops: OpSet) -> None:
    packed, x = ops.pack_linear(scaled(70, 600, 40)[0], torch.randn(70)), torch.randn(77, 600)
    together = ops.linear(x, packed)
    for begin, end in ((0, 1), (3, 5), (10, 22), (20, 33), (76, 77)):
        alone = ops.linear(x[begin:end], packed)
        torch.testing.assert_close(alone, together[begin:end], rtol=0, atol=1e-3)
        assert torch.equal(alone, together[begin:end]) or type(packed) is not PanelLinear


def test_it_takes_a_byte_a_number_and_its_scales(ops: OpSet) -> None:
    assert ops.pack_linear(scaled(64, 256, 128)[0]).nbytes == 64 * 256 + 64 * 2 * 4


@pytest.mark.parametrize("quantization", ["int8", "fp8", "w8a8"])
def test_it_is_not_quantised_again(ops: OpSet, quantization: str) -> None:
    with pytest.raises(ValueError, match=f"not quantised again, to {quantization}"):
        ops.pack_linear(scaled(4, 8, 8)[0], quantization=quantization)
    with pytest.raises(ValueError, match="not quantised again"):
        ops.pack_experts([scaled(4, 8, 8)[0]], quantization=quantization)


@pytest.mark.parametrize("num_tokens", sizes([1, 5, 40, 200], [1, 13, 70]))
@pytest.mark.parametrize("size", SIZES[:3], ids=str)
def test_grouped_linear(ops: OpSet, size: tuple[int, int, int], num_tokens: int) -> None:
    experts = [scaled(*size) for _ in range(6)]
    packed = ops.pack_experts(tuple(weight for weight, _ in experts))
    choice = ops.route(torch.randn(num_tokens, 6), RouteRule(num_chosen=2))
    x = torch.randn(num_tokens, size[1])
    found = ops.combine(ops.grouped_linear(x, packed, choice, from_tokens=True), choice)
    rows = [sum(weight * (experts[expert][1] @ x[t].double()) for expert, weight in zip(ids, weights)) for
            t, (ids, weights) in enumerate(zip(choice.ids_TK.tolist(), choice.weights_TK.tolist()))]
    torch.testing.assert_close(found.double(), torch.stack(rows), rtol=0, atol=1e-4)


def test_rows_are_stacked() -> None:
    """What is of one kind stays so; else all become plain."""
    (a, whole_a), (b, whole_b), (c, whole_c) = scaled(3, 40, 16), scaled(5, 40, 16), scaled(2, 40, 8)
    both = stack_rows([a, b])
    assert isinstance(both, ScaledWeight) and both.group == 16 and both.shape == (8, 40)
    torch.testing.assert_close(both.dequantise(torch.float32).double(), torch.cat([whole_a, whole_b]))
    plain = torch.randn(4, 40, dtype=torch.bfloat16)
    for other, whole, dtype in ((c, whole_c, torch.float32), (plain, plain, torch.bfloat16)):
        mixed = stack_rows([a, other])
        assert isinstance(mixed, Tensor) and mixed.dtype is dtype
        torch.testing.assert_close(mixed, torch.cat([whole_a.to(dtype), whole.to(dtype)]))
    assert stack_rows([a]) is a
