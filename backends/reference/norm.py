"""RMS norms (Zhang and Sennrich 2019) in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    x = x_TD.float()
    x = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)
    return x.to(x_TD.dtype) * weight_D


def add_rms_norm(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    residual_TD.add_(x_TD)
    return rms_norm(residual_TD, weight_D, eps)
