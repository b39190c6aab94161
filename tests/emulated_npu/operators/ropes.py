"""Rotary position embedding in its three forms."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.emulated_npu.operators.registry import emulates, refuse


def _rotated(x: Tensor, mode: str) -> Tensor:
    if mode == "half":
        first, second = x.chunk(2, -1)
        return torch.cat((-second, first), -1)
    if mode != "interleave":
        raise RuntimeError(f"rotary_mode {mode!r} is neither half nor interleave")
    return torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)


@emulates("npu::npu_rotary_mul")
def rotary_mul(
    input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None
) -> Tensor:
    """`r1` is the cosine, `r2` the sine, of 4 dimensions like `input`, broadcast where they are 1."""
    refuse("npu_rotary_mul", {"rotate": rotate})
    if input.dim() != 4 or r1.shape != r2.shape or r1.dim() != 4 or r1.shape[-1] != input.shape[-1]:
        raise RuntimeError(f"npu_rotary_mul: {tuple(input.shape)} with {tuple(r1.shape)} and {tuple(r2.shape)}")
    wide = input.float()
    return (wide * r1.float() + _rotated(wide, rotary_mode) * r2.float()).to(input.dtype)


@emulates("npu::npu_apply_rotary_pos_emb")
def apply_rotary_pos_emb(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, layout: str = "BSND", rotary_mode: str = "half"
) -> tuple[Tensor, Tensor]:
    """On the device the results also land in query and key, which the schema does not say. Neither may be relied on."""
    dims = {"BSND": 4, "BSH": 4, "TND": 3}.get(layout)
    if dims is None or query.dim() != dims or key.dim() != dims or cos.dim() != dims:
        raise RuntimeError(f"npu_apply_rotary_pos_emb: layout {layout} with {query.dim()} dimensions")
    if query.shape[-1] not in (64, 128) or cos.shape[-2] != 1 or rotary_mode != "half":
        raise RuntimeError("npu_apply_rotary_pos_emb: head_dim is 64 or 128, cos has one head, rotary_mode is half")
    if len({query.dtype, key.dtype, cos.dtype, sin.dtype}) > 1:
        raise RuntimeError("npu_apply_rotary_pos_emb: types differ")

    def turned(x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * cos.float() + _rotated(wide, "half") * sin.float()).to(x.dtype)

    return turned(query), turned(key)


@emulates("npu::npu_mrope")
def mrope(
    positions: Tensor,
    query: Tensor,
    key: Tensor,
    cos_sin_cache: Tensor,
    head_size: int,
    *,
    mrope_section: Sequence[int] | None = None,
    rotary_mode: str | None = "half",
    cache_mode: str | None = "default",
) -> tuple[Tensor, Tensor]:
    """positions (T) or (3, T); query and key (T, heads * head_size); cache (positions, rotary_dim): cosines, sines."""
    refuse("npu_mrope", {"cache_mode": cache_mode}, ("default", None))
    rotary_dim = cos_sin_cache.shape[-1]
    if rotary_dim % (16 if query.dtype is torch.float32 else 32):
        raise RuntimeError(f"npu_mrope: rotary_dim {rotary_dim} is not aligned for {query.dtype}")
    sections = list(mrope_section or (0, 0, 0))
    cos_sin = cos_sin_cache[positions.long()].float()  # (T, rotary_dim) or (3, T, rotary_dim)
    cos, sin = cos_sin.chunk(2, -1)
    if any(sections):
        if positions.dim() != 2 or sum(sections) != rotary_dim // 2:
            raise RuntimeError(
                f"npu_mrope: sections {sections} for rotary_dim {rotary_dim}, positions of {positions.dim()} dimensions"
            )
        cos, sin = (torch.cat([part[i] for i, part in enumerate(each.split(sections, -1))], -1) for each in (cos, sin))
    elif positions.dim() != 1:
        raise RuntimeError("npu_mrope: positions of three rows without mrope_section")
    mode = rotary_mode or "half"
    wide_cos, wide_sin = (_widened(each, mode)[:, None] for each in (cos, sin))

    def turned(x: Tensor) -> Tensor:
        heads = x.float().view(x.shape[0], -1, head_size)
        part = heads[..., :rotary_dim]
        done = part * wide_cos + _rotated(part, mode) * wide_sin
        return torch.cat((done, heads[..., rotary_dim:]), -1).view(x.shape).to(x.dtype)

    return turned(query), turned(key)


def _widened(half: Tensor, mode: str) -> Tensor:
    return torch.cat((half, half), -1) if mode == "half" else half.repeat_interleave(2, -1)
