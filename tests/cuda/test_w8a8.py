"""int8 products where the numbers are the device's own: rows of x in int8, cuBLAS's sums, and what is made of them."""

from __future__ import annotations

import pytest
import torch

from backends.cpu.linear import int8_product
from backends.reference import linear as reference
from cuda_ops import linear
from tests.ops.test_linear import spread_rows, w8a8_truth, weights


@pytest.mark.parametrize("size", [(1, 1), (3, 33), (5, 2048), (2, 3000)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_rows_in_int8(size: tuple[int, int], dtype: torch.dtype) -> None:
    wide = torch.full((size[0], size[1] + 9), float("nan")).to(dtype)
    x = wide[:, 4 : 4 + size[1]]
    x.copy_(spread_rows(*size))
    codes, scale = linear.quantise_rows(x, torch.int8)
    expected, expected_scale = reference.quantise_tokens(x)
    assert codes.dtype is torch.int8 and torch.equal(codes, expected) and torch.equal(scale, expected_scale)


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "plain"])
def test_sums_that_are_not_the_kernels_own(with_bias: bool) -> None:
    """What follows torch's product gives the bits of the kernel that does both."""
    (weight_YX, bias_Y), x = weights((72, 160)), spread_rows(70, 160)
    packed = reference.pack_linear(weight_YX, bias_Y if with_bias else None, quantization="w8a8")
    codes_TX, scale_T = linear.quantise_rows(x, torch.int8)
    sums_TY = int8_product(codes_TX, packed.weight_YX).int()
    y = linear.rescale(sums_TY, scale_T, packed.scale_Y, packed.bias_Y, torch.float32)
    assert torch.equal(y, linear.linear(x, packed))
    if not with_bias:
        assert torch.equal(y, w8a8_truth(x, weight_YX))


def test_what_torch_multiplies() -> None:
    """On a device: sizes that are multiples of eight, and more rows than the kernel is for."""
    x, weight = torch.empty(70, 160, device="meta"), torch.empty(48, 160, dtype=torch.int8, device="meta")
    assert not linear.multiplies_int8(x, weight)  # not a device
    fits = linear.fits_int_mm
    assert fits(65, weight) and not fits(64, weight)
    assert not fits(65, weight[:47]) and not fits(65, weight[:, :159])
