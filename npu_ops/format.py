"""Memory formats of tensors: ND, as torch has them, and FRACTAL_NZ, the tiles that the cube unit reads fast."""

from __future__ import annotations

import torch
from torch import Tensor

from npu_ops.contracts import check
from npu_ops.quant_contracts import FRACTAL_NZ, ND

__all__ = ["FRACTAL_NZ", "ND", "cast_format", "format_of"]


def cast_format(*, x: Tensor, acl_format: int) -> Tensor:
    """The same numbers in another format; shape and dtype stay."""
    check("npu_format_cast", input=x, acl_format=acl_format)
    out: Tensor = torch.ops.npu.npu_format_cast(x, acl_format)
    return out


def format_of(x: Tensor) -> int:
    return int(torch.ops.npu.get_npu_format(x))
