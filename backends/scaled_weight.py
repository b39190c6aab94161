"""`ScaledWeight`: a matrix of fp8 numbers with a scale for each run of them, as checkpoints of fp8 bring it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class ScaledWeight:
    """weight[y, x] = codes[y, x] * scale[y, x // group]. Letters: Y outputs, X inputs, G runs of `group` inputs.

    codes_YX: float8_e4m3fn. scale_YG: fp32, positive and finite; G = ceil(X / group). Blocks of
    several rows (DeepSeek's are 128 x 128) are rows with equal scales, so that a part of a matrix, or a stack of
    several, is one too wherever the cuts are.
    """

    __slots__ = ("codes_YX", "group", "nbytes", "scale_YG")

    def __init__(self, codes_YX: Tensor, scale_YG: Tensor, group: int):
        assert scale_YG.shape == (len(codes_YX), -(-codes_YX.shape[1] // group))
        self.codes_YX, self.scale_YG, self.group = codes_YX, scale_YG, group
        self.nbytes = codes_YX.nbytes + scale_YG.nbytes

    @property
    def shape(self) -> torch.Size:
        return self.codes_YX.shape

    def __len__(self) -> int:
        return len(self.codes_YX)

    def to(self, device: torch.device) -> ScaledWeight:
        """A copy there."""
        codes_YX = self.codes_YX.to(device, copy=True, memory_format=torch.contiguous_format)
        return ScaledWeight(codes_YX, self.scale_YG.to(device, copy=True), self.group)

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        """The matrix: products in fp32, rounded to `dtype`."""
        weight_YX, num_inputs = self.codes_YX.to(torch.float32, memory_format=torch.contiguous_format), self.shape[1]
        even = num_inputs // self.group * self.group
        runs_YGX = weight_YX[:, :even].unflatten(1, (even // self.group, self.group))
        runs_YGX.mul_(self.scale_YG[:, :even // self.group, None])
        if even < num_inputs:
            weight_YX[:, even:].mul_(self.scale_YG[:, -1:])
        return weight_YX.to(dtype)


def stack_rows(parts: Sequence[Tensor | ScaledWeight]) -> Tensor | ScaledWeight:
    """Matrices one below the other. Where only some are of fp8, or their runs differ, all become plain."""
    if len(parts) == 1:
        return parts[0]
    scaled = [part for part in parts if isinstance(part, ScaledWeight)]
    if len(scaled) == len(parts) and len({part.group for part in scaled}) == 1:
        codes_YX = torch.cat([part.codes_YX for part in scaled])
        return ScaledWeight(codes_YX, torch.cat([part.scale_YG for part in scaled]), scaled[0].group)
    dtype = next((part.dtype for part in parts if isinstance(part, Tensor)), torch.float32)
    return torch.cat([part.dequantise(dtype) if isinstance(part, ScaledWeight) else part for part in parts])
