"""Linear layers and the token table, in plain torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# The dtype of the codes, and the largest of them.
FORMATS = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}


class PackedLinear:
    """A weight ready for `linear`. With `scale_Y` the weight is codes, and row y stands for weight[y] * scale[y]."""

    __slots__ = ("bias_Y", "nbytes", "scale_Y", "weight_YX")

    def __init__(self, weight_YX: Tensor, scale_Y: Tensor | None, bias_Y: Tensor | None):
        self.weight_YX = weight_YX
        self.scale_Y = scale_Y
        self.bias_Y = bias_Y
        self.nbytes = sum(t.nbytes for t in (weight_YX, scale_Y, bias_Y) if t is not None)


def check_quantization(quantization: str | None) -> None:
    """Raise ValueError unless it is None or one of `FORMATS`."""
    if quantization is not None and quantization not in FORMATS:
        raise ValueError(f"quantization must be None or one of {', '.join(FORMATS)}, got {quantization!r}")


def quantize_rows(weight_YX: Tensor, quantization: str) -> tuple[Tensor, Tensor]:
    """(codes [Y, X], fp32 scale [Y]) with weight ~ codes * scale; each row's largest number has the largest code."""
    dtype, largest = FORMATS[quantization]
    weight = weight_YX.float()
    scale_Y = weight.abs().amax(dim=1).div_(largest)
    divisor_Y = torch.where(scale_Y > 0, scale_Y, 1.0)
    codes = weight / divisor_Y[:, None]
    return (codes.round() if dtype is torch.int8 else codes).to(dtype), scale_Y


def pack_linear(weight_YX: Tensor, bias_Y: Tensor | None = None, *, quantization: str | None = None) -> PackedLinear:
    check_quantization(quantization)
    if quantization is not None:
        return PackedLinear(*quantize_rows(weight_YX, quantization), bias_Y)
    return PackedLinear(weight_YX.contiguous(), None, bias_Y)


def linear(x_TX: Tensor, packed: Any) -> Tensor:
    weight_YX = packed.weight_YX
    if packed.scale_Y is not None:
        weight_YX = (weight_YX.float() * packed.scale_Y[:, None]).to(x_TX.dtype)
    return F.linear(x_TX, weight_YX, packed.bias_Y)


def feed_tokens(input_ids_T: Tensor, feed_T: Tensor, sampled_Q: Tensor) -> Tensor:
    fed_T = sampled_Q[feed_T.clamp(min=0).long()].clamp(min=0)
    return torch.where(feed_T >= 0, fed_T.to(torch.int32), input_ids_T)


def embedding(ids_T: Tensor, weight_VD: Tensor) -> Tensor:
    return weight_VD[ids_T]
