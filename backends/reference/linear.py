"""Linear layers and the token table, in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from backends.scaled_weight import ScaledWeight

# The dtype of the codes, and the largest of them.
FORMATS = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0), "w8a8": (torch.int8, 127.0)}
MOST_INPUTS = (2**31 - 1) // 127**2  # of a product whose int32 sums cannot overflow
LEAST_NUMBER = 2.0**-100  # a row whose largest number is smaller is zeros: 127 / it might not be finite


class PackedLinear:
    """A weight ready for `linear`. With `scale_Y` the weight is codes, and row y stands for weight[y] * scale[y].

    dynamic: x is brought to int8 as well.
    """

    __slots__ = ("bias_Y", "dynamic", "nbytes", "scale_Y", "weight_YX")

    def __init__(self, weight_YX: Tensor, scale_Y: Tensor | None, bias_Y: Tensor | None, *, dynamic: bool = False):
        self.weight_YX = weight_YX
        self.scale_Y = scale_Y
        self.bias_Y = bias_Y
        self.dynamic = dynamic
        self.nbytes = sum(t.nbytes for t in (weight_YX, scale_Y, bias_Y) if t is not None)


class PackedScaled:
    """A matrix of fp8 with the scales of its checkpoint, ready for `linear`."""

    __slots__ = ("bias_Y", "nbytes", "weight_YX")
    dynamic = False

    def __init__(self, weight_YX: ScaledWeight, bias_Y: Tensor | None):
        self.weight_YX, self.bias_Y = weight_YX, bias_Y
        self.nbytes = weight_YX.nbytes + (0 if bias_Y is None else bias_Y.nbytes)


def check_quantization(quantization: str | None) -> None:
    """Raise ValueError unless it is None or one of `FORMATS`."""
    if quantization is not None and quantization not in FORMATS:
        raise ValueError(f"quantization must be None or one of {', '.join(FORMATS)}, got {quantization!r}")


def check_unquantised(quantization: str | None) -> None:
    """Raise ValueError unless it is None, as a `ScaledWeight` has its scales already."""
    if quantization is not None:
        raise ValueError(f"a matrix of fp8 with its own scales is not quantised again, to {quantization}")


def quantize_rows(weight_YX: Tensor, quantization: str) -> tuple[Tensor, Tensor]:
    """(codes [Y, X], fp32 scale [Y]) with weight ~ codes * scale; each row's largest number has the largest code."""
    dtype, largest = FORMATS[quantization]
    weight = weight_YX.float()
    scale_Y = weight.abs().amax(dim=1).div_(largest)
    divisor_Y = torch.where(scale_Y > 0, scale_Y, 1.0)
    codes = weight / divisor_Y[:, None]
    return (codes.round() if dtype is torch.int8 else codes).to(dtype), scale_Y


def check_inputs(num_inputs: int) -> None:
    """Raise ValueError if a product of int8 numbers has more inputs than its int32 sums have room for."""
    if num_inputs > MOST_INPUTS:
        raise ValueError(f"products of int8 numbers take up to {MOST_INPUTS} inputs, not {num_inputs}")


def quantise_tokens(x_TX: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 codes [T, X], fp32 scale [T]) of the rows of x, as `LinearOp` says for "w8a8"."""
    x = x_TX.float()
    largest_T = x.abs().amax(dim=1)
    finite_T = largest_T.isfinite()
    # Not 127.0 / largest, which torch takes for a reciprocal and a product.
    factor_T = torch.where(finite_T & (largest_T >= LEAST_NUMBER), torch.full_like(largest_T, 127.0) / largest_T, 0.0)
    codes = torch.where(finite_T[:, None], (x * factor_T[:, None]).round(), 0.0).to(torch.int8)
    return codes, torch.where(finite_T, largest_T * (1 / 127), float("nan"))


def exact_product(codes_TX: Tensor, codes_YX: Tensor) -> Tensor:
    """codes @ codes.T; in float64, where every such sum is exact in any order on any device."""
    return codes_TX.double() @ codes_YX.double().t()


def pack_linear(weight_YX: Tensor | ScaledWeight, bias_Y: Tensor | None = None, *,
                quantization: str | None = None) -> PackedLinear | PackedScaled:
    if isinstance(weight_YX, ScaledWeight):
        check_unquantised(quantization)
        return PackedScaled(weight_YX, bias_Y)
    check_quantization(quantization)
    if quantization is None:
        return PackedLinear(weight_YX.contiguous(), None, bias_Y)
    if quantization == "w8a8":
        check_inputs(weight_YX.shape[1])
    return PackedLinear(*quantize_rows(weight_YX, quantization), bias_Y, dynamic=quantization == "w8a8")


def linear_w8a8(x_TX: Tensor, packed: PackedLinear,
                product: Callable[[Tensor, Tensor], Tensor] = exact_product) -> Tensor:
    """product: of int8 codes [T, X] and [Y, X], exact, in any dtype."""
    assert packed.scale_Y is not None
    codes_TX, scale_T = quantise_tokens(x_TX)
    y_TY = product(codes_TX, packed.weight_YX).float() * scale_T[:, None] * packed.scale_Y
    return (y_TY if packed.bias_Y is None else y_TY + packed.bias_Y.float()).to(x_TX.dtype)


def linear(x_TX: Tensor, packed: Any) -> Tensor:
    if packed.dynamic:
        return linear_w8a8(x_TX, packed)
    weight_YX = packed.weight_YX
    if isinstance(weight_YX, ScaledWeight):
        weight_YX = weight_YX.dequantise(x_TX.dtype)
    elif packed.scale_Y is not None:
        weight_YX = (weight_YX.float() * packed.scale_Y[:, None]).to(x_TX.dtype)
    return F.linear(x_TX, weight_YX, packed.bias_Y)


def feed_tokens(input_ids_T: Tensor, feed_T: Tensor, sampled_Q: Tensor) -> Tensor:
    fed_T = sampled_Q[feed_T.clamp(min=0).long()].clamp(min=0)
    return torch.where(feed_T >= 0, fed_T.to(torch.int32), input_ids_T)


def embedding(ids_T: Tensor, weight_VD: Tensor) -> Tensor:
    return weight_VD[ids_T]
