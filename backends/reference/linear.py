"""Linear layers and the token table, in plain torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

INT8_MAX = 127.0


class PackedLinear:
    """A weight ready for `linear`. With `scale_Y` the weight is int8 and row y stands for weight[y] * scale[y]."""

    __slots__ = ("bias_Y", "nbytes", "scale_Y", "weight_YX")

    def __init__(self, weight_YX: Tensor, scale_Y: Tensor | None, bias_Y: Tensor | None):
        self.weight_YX = weight_YX
        self.scale_Y = scale_Y
        self.bias_Y = bias_Y
        self.nbytes = sum(t.nbytes for t in (weight_YX, scale_Y, bias_Y) if t is not None)


def check_quantization(quantization: str | None) -> None:
    """Raise ValueError unless it is None or "int8"."""
    if quantization not in (None, "int8"):
        raise ValueError(f"quantization must be None or 'int8', got {quantization!r}")


def quantize_rows(weight_YX: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 per row: (int8 [Y, X] in [-127, 127], fp32 scale [Y]), weight ~ int8 * scale."""
    weight = weight_YX.float()
    scale_Y = weight.abs().amax(dim=1).div_(INT8_MAX)
    divisor_Y = torch.where(scale_Y > 0, scale_Y, 1.0)
    return torch.round(weight / divisor_Y[:, None]).to(torch.int8), scale_Y


def pack_linear(weight_YX: Tensor, bias_Y: Tensor | None = None, *, quantization: str | None = None) -> PackedLinear:
    check_quantization(quantization)
    if quantization == "int8":
        return PackedLinear(*quantize_rows(weight_YX), bias_Y)
    return PackedLinear(weight_YX.contiguous(), None, bias_Y)


def linear(x_TX: Tensor, packed: Any) -> Tensor:
    weight_YX = packed.weight_YX
    if packed.scale_Y is not None:
        weight_YX = (weight_YX.float() * packed.scale_Y[:, None]).to(x_TX.dtype)
    return F.linear(x_TX, weight_YX, packed.bias_Y)


def embedding(ids_T: Tensor, weight_VD: Tensor) -> Tensor:
    return weight_VD[ids_T]
