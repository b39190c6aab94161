"""The CPU's linear layers without compiled kernels: oneDNN, with fp32 weights brought into its blocked order once.

`F.linear` repacks the weight inside every call; with packed weights a step pays only the product.
Anything that oneDNN cannot do here (another dtype, a build of torch without it) takes the reference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from backends.reference import linear as reference

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


def pack_linear(weight_YX: Tensor, bias_Y: Tensor | None = None, *, quantization: str | None = None) -> Any:
    if quantization is None and weight_YX.dtype is torch.float32 and has_onednn():
        return OneDnnLinear(weight_YX, bias_Y)
    return reference.pack_linear(weight_YX, bias_Y, quantization=quantization)


def linear(x_TX: Tensor, packed: Any) -> Tensor:
    if type(packed) is OneDnnLinear:
        y_TY: Tensor = _pointwise(x_TX, packed.weight, packed.bias_Y, "none", _NO_SCALARS, "")
        return y_TY
    return reference.linear(x_TX, packed)


_NO_SCALARS: list[float] = []
_pointwise: Any = torch.ops.mkldnn._linear_pointwise.default if has_onednn() else None
