"""Format casts: the real description of the tensor changes, its bytes keep their plain order."""

from __future__ import annotations

from typing import Any

import torch
import torch_npu
from torch import Tensor

from tests.emulated_npu.operators.registry import refuse

ND, FRACTAL_NZ = 2, 29


def format_cast(input: Tensor, acl_format: int, **given: Any) -> Tensor:
    refuse("npu_format_cast", given)
    if acl_format not in (ND, FRACTAL_NZ):
        raise NotImplementedError(f"npu_format_cast: format {acl_format} is not emulated")
    if int(torch_npu.get_npu_format(input)) == acl_format:
        return input
    lane = 32 // input.element_size()
    if acl_format == FRACTAL_NZ and (input.dim() < 2 or input.shape[-1] % lane or input.shape[-2] % 16):
        raise RuntimeError(
            f"npu_format_cast: {tuple(input.shape)} of {input.dtype} does not fill fractals of 16 x {lane}"
        )
    made = torch_npu.empty_with_format(input.shape, dtype=input.dtype, device=input.device, acl_format=acl_format)
    return made.copy_(input)


def replace_format_cast() -> torch.library.Library:
    library = torch.library.Library("npu", "IMPL")
    library.impl("npu_format_cast", format_cast, "PrivateUse1", allow_override=True)
    return library
