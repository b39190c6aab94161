"""fp8 where the numbers are the device's own: rows of x in e4m3, their product, and codes in half precision."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from backends.cuda_linear import by_run
from backends.reference.linear import quantize_rows
from cuda_ops import linear
from cuda_ops.launch import TABLE
from cuda_ops.linear import within_runs
from tests.ops.test_linear import stored_weight, weights
from tests.ops.test_scaled_weight import scaled

FP8 = torch.float8_e4m3fn


@triton.jit
def widen_kernel(codes_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out_ptr + at, linear.widen_e4m3(tl.load(codes_ptr + at), out_ptr.dtype.element_ty))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_every_number_is_widened_exactly(dtype: torch.dtype) -> None:
    """The interpreter has no bfloat16 to multiply; what happens there is float16's with other constants."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.int8)
    out = torch.empty(256, dtype=dtype)
    widen_kernel[(1,)](codes, out, N=256)
    truth = codes.view(FP8).to(dtype)
    assert torch.equal(out[truth.isfinite()], truth[truth.isfinite()])


def in_rows(x_TX: Tensor) -> Tensor:
    """x after rounding to e4m3 with a scale per row, in float64."""
    scale = x_TX.double().abs().amax(1, keepdim=True) / 448
    return (x_TX.double() / scale).float().to(FP8).double() * scale


@pytest.mark.parametrize("size", [(1, 1), (3, 33), (5, 2048), (2, 3000)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_rows_in_fp8(size: tuple[int, int], dtype: torch.dtype) -> None:
    wide = torch.full((size[0], size[1] + 9), float("nan")).to(dtype)
    x = wide[:, 4 : 4 + size[1]]
    x.copy_(torch.randn(size) * torch.randn(size[0], 1).mul(3).exp())
    codes, scale = linear.quantise_rows(x)
    assert codes.dtype is FP8 and codes.float().abs().amax(1).tolist() == [448.0] * size[0]
    found, truth = codes.double() * scale.double()[:, None], in_rows(x)
    off = (found - truth).abs()  # a number half way between two codes may take either
    assert (off <= truth.abs() / 8 + truth.abs().amax(1, keepdim=True) * 2.0**-17).all()
    assert (off > truth.abs() * 1e-5).double().mean() < 0.01


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_a_row_that_is_not_finite_is_nan(bad: float) -> None:
    x = torch.randn(3, 40)
    x[1, 7] = bad
    codes, scale = linear.quantise_rows(x)
    numbers = codes.float() * scale[:, None]
    assert numbers[1].isnan().all() and numbers[[0, 2]].isfinite().all()
    zeros, scale = linear.quantise_rows(torch.zeros(1, 40))
    assert torch.equal(zeros.float() * scale, torch.zeros(1, 40))


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "plain"])
def test_product_of_fp8_numbers(with_bias: bool) -> None:
    """torch's own product, as a device has it."""
    weight_YX, bias_Y = weights((48, 160))
    codes_YX, scale_Y = quantize_rows(weight_YX, "fp8")
    x = torch.randn(70, 160).bfloat16()
    bias = bias_Y.bfloat16() if with_bias else None
    y = linear.linear_fp8(x, codes_YX, scale_Y, bias)
    assert y.dtype is torch.bfloat16
    codes_TX, scale_T = linear.quantise_rows(x)
    added = bias.double() if bias is not None else 0.0
    truth = (codes_TX.double() * scale_T.double()[:, None]) @ stored_weight(weight_YX, "fp8").T + added
    torch.testing.assert_close(y.double(), truth, rtol=2.0**-7, atol=2.0**-8)
    exact = x.double() @ weight_YX.double().T + added
    assert 0.01 < float((y.double() - exact).norm() / exact.norm()) < 0.05


def test_only_what_torch_multiplies_is_multiplied_so() -> None:
    x, weight = torch.empty(70, 160, dtype=torch.bfloat16), torch.empty(48, 160, dtype=FP8)
    assert not linear.multiplies_fp8(x, weight)  # not on a CPU


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)  # interpreted, bfloat16 is cut off
@pytest.mark.parametrize("size", [(33, 7, 128), (31, 600, 128), (9, 130, 24), (1, 3, 1)], ids=str)
def test_bits_of_the_matrix_that_runs_stand_for(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    """What more rows are multiplied with."""
    weight = by_run(scaled(*size)[0])
    found = linear.dequantise(weight.codes_YX, weight.scale_YG.t(), weight.group, dtype)
    assert torch.equal(found, weight.dequantise(dtype))


def test_a_product_has_one_scale_where_that_can_be() -> None:
    """For every entry of the table; shorter runs make it shallower, down to what tensor cores multiply."""
    archs = [arch for op in ("linear_fp8", "grouped_bytes") for arch in TABLE[op].values()]
    for entry in (entry for arch in archs for entry in arch.values()):
        assert within_runs(entry, 0) == within_runs(entry, 128) == entry
        assert within_runs(entry, 48) == {**entry, "DEPTH": 16}
        assert within_runs(entry, 40) == within_runs(entry, 1) == {**entry, "num_stages": 2}
