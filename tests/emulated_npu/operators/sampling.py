"""Top-k and top-p."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.emulated_npu.operators.registry import emulates


def _like_logits(logits: Tensor, p: Tensor | None = None, k: Tensor | None = None) -> Tensor:
    return torch.empty_like(logits)


@emulates("npu::npu_top_k_top_p", shapes=_like_logits)  # the wheel's meta kernel fails without k
def top_k_top_p(logits: Tensor, p: Tensor | None = None, k: Tensor | None = None) -> Tensor:
    """The documented steps: sort upwards, drop below the k-th, then the smallest with a sum of at most 1 - p."""
    if logits.dim() != 2 or (p is None and k is None):
        raise RuntimeError("npu_top_k_top_p: logits are of two dimensions, and p and k are not both absent")
    if p is not None and (p.dtype != logits.dtype or p.shape != logits.shape[:1]):
        raise RuntimeError(f"npu_top_k_top_p: p is {p.dtype} {tuple(p.shape)}, logits {logits.dtype}")
    values, order = logits.sort(dim=-1, stable=True)
    if k is not None:
        if k.dtype is not torch.int32 or k.shape != logits.shape[:1]:
            raise RuntimeError(f"npu_top_k_top_p: k is {k.dtype} {tuple(k.shape)}")
        if k.numel() and (int(k.min()) < 1 or int(k.max()) > min(1024, logits.shape[1])):
            raise RuntimeError(f"npu_top_k_top_p: k {k.tolist()} is not in [1, {min(1024, logits.shape[1])}]")
        bound = values.gather(1, logits.shape[1] - k.long()[:, None])
        values = values.masked_fill(values < bound, float("-inf"))
    if p is not None:
        dropped = values.float().softmax(-1).cumsum(-1) <= 1 - p.float()[:, None]
        dropped[:, -1] = False
        values = values.masked_fill(dropped, float("-inf"))
    return torch.empty_like(logits).scatter_(1, order, values)
