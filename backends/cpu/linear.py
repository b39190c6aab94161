"""The CPU's linear layers without compiled kernels: oneDNN, with fp32 weights brought into its blocked order once.

`F.linear` repacks the weight inside every call; with packed weights a step pays only the product.
Anything that oneDNN cannot do here (another dtype, a build of torch without it) takes the reference.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from backends.reference import linear as reference
from backends.scaled_weight import ScaledWeight

BATCH_HINT = 16  # rows that oneDNN optimises the order for; measured as good as any from 1 to 2048 rows


class OneDnnLinear:
    """An fp32 weight in oneDNN's blocked order; the original may be dropped."""

    __slots__ = ("bias_Y", "nbytes", "weight")

    def __init__(self, weight_YX: Tensor, bias_Y: Tensor | None):
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight_YX.detach().contiguous(), BATCH_HINT)
        self.bias_Y = bias_Y
        self.nbytes = weight_YX.nbytes + (0 if bias_Y is None else bias_Y.nbytes)


def has_onednn() -> bool:
    return bool(torch._C._has_mkldnn) and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


def pack_linear(weight_YX: Tensor | ScaledWeight, bias_Y: Tensor | None = None, *,
                quantization: str | None = None) -> Any:
    if isinstance(weight_YX, ScaledWeight):
        return reference.pack_linear(weight_YX, bias_Y, quantization=quantization)
    if quantization is None and weight_YX.dtype is torch.float32 and has_onednn():
        return OneDnnLinear(weight_YX, bias_Y)
    return reference.pack_linear(weight_YX, bias_Y, quantization=quantization)


def int8_product(codes_TX: Tensor, codes_YX: Tensor) -> Tensor:
    """The reference's `exact_product`, by integers where torch multiplies them exactly."""
    if has_exact_int8():
        return torch._int_mm(codes_TX, codes_YX.t())
    return reference.exact_product(codes_TX, codes_YX)


@lru_cache
def has_exact_int8() -> bool:
    """Whether `torch._int_mm` is exact here: x86 before VNNI adds products in pairs, in 16 bits that may saturate."""
    ones, signs = torch.ones(32, 64, dtype=torch.int8), torch.ones(64, 64, dtype=torch.int8)
    signs[::2] = -1
    return torch.equal(torch._int_mm(127 * ones, (127 * signs).t()), 64 * 127**2 * signs[:, 0].int().expand(32, -1))


def linear(x_TX: Tensor, packed: Any) -> Tensor:
    if type(packed) is OneDnnLinear:
        y_TY: Tensor = _pointwise(x_TX, packed.weight, packed.bias_Y, "none", _NO_SCALARS, "")
        return y_TY
    if packed.dynamic:
        return reference.linear_w8a8(x_TX, packed, int8_product)
    return reference.linear(x_TX, packed)


_NO_SCALARS: list[float] = []
_pointwise: Any = torch.ops.mkldnn._linear_pointwise.default if has_onednn() else None
