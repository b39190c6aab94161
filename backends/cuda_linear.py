"""Linear layers on CUDA: the contracts of `opset.py` over the kernels of `cuda_ops/linear.py`."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from backends.reference import linear as reference
from backends.reference.linear import PackedLinear, PackedScaled
from backends.scaled_weight import ScaledWeight
from cuda_ops import linear as kernels


def pack_linear(weight_YX: Tensor | ScaledWeight, bias_Y: Tensor | None = None, *,
                quantization: str | None = None) -> PackedLinear | PackedScaled:
    if isinstance(weight_YX, ScaledWeight):
        weight_YX = by_run(weight_YX)
    return reference.pack_linear(weight_YX, bias_Y, quantization=quantization)


def by_run(weight_YX: ScaledWeight) -> ScaledWeight:
    """The same; in memory, codes lie as rows and scales as columns: a kernel reads those of many outputs at a time."""
    scale_GY = weight_YX.scale_YG.t().contiguous()
    return ScaledWeight(weight_YX.codes_YX.contiguous(), scale_GY.t(), weight_YX.group)


def linear(x_TX: Tensor, packed: PackedLinear | PackedScaled) -> Tensor:
    if not isinstance(packed, PackedScaled):
        return kernels.linear(x_TX, packed)
    weight_YX, scale_GY, run = packed.weight_YX.codes_YX, packed.weight_YX.scale_YG.t(), packed.weight_YX.group
    if len(x_TX) <= kernels.FEW_ROWS:
        return kernels.linear_bytes(x_TX, weight_YX, scale_GY, packed.bias_Y, run=run)
    return F.linear(x_TX, kernels.dequantise(weight_YX, scale_GY, run, x_TX.dtype), packed.bias_Y)
