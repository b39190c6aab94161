"""KV numbers of one byte: codes in groups with a scale each. A group is one head's key, or value, of one position.

    int8  int8 codes and an fp32 scale:           number = code * scale
    fp8   float8_e4m3fn codes and an E8M0 scale:  number = code * 2^(scale - 127)

The scale is the smallest that holds the group's largest number, rounded such that what was decoded is encoded again as
the same bytes: up to 16 significant bits for int8 (a code times a scale is then exact in fp32), to a power of two for
fp8. A group below 2^-100 is kept as zeros. A group with an inf or a NaN in it is read as NaN, all of it.

A cache of such numbers is a tensor of dtype int8 or float8_e4m3fn: in `Backend.kv_cache_shape` a row
has `row_width` of them instead of H, and one head of a block is its codes, in the order of the cache's own layout,
followed by its P scales.

E8M0 and one scale a group: OCP Microscaling Formats (MX) 1.0, 2023, with groups of H instead of 32 numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
QUANTISED: dict[torch.dtype, str] = {torch.int8: "int8", FP8: "fp8"}
SCALE_BYTES = {"int8": 4, "fp8": 1}
TINY = 2.0**-100  # groups whose largest number is below are kept as zeros: their scale might not be a normal fp32
FP8_NAN = 255  # the E8M0 scale that stands for NaN (OCP MX 1.0)


def row_width(head_dim: int, dtype: torch.dtype) -> int:
    """Numbers that one position of one head takes in a cache of this dtype."""
    return head_dim + SCALE_BYTES[QUANTISED[dtype]] if dtype in QUANTISED else head_dim


def split_tiles(cache: Tensor) -> tuple[Tensor, Tensor]:
    """A quantised cache [B, K, P, width] as its codes, uint8 [B, K, P * H], and its scales, fp32 or uint8 [B, K, P]."""
    format, (block_size, width) = QUANTISED[cache.dtype], cache.shape[2:]
    tiles_BKX = cache.view(torch.uint8).flatten(2)
    size = block_size * (width - SCALE_BYTES[format])
    scales = tiles_BKX[..., size:]
    return tiles_BKX[..., :size], scales.view(torch.float32) if format == "int8" else scales


def quantise(x: Tensor, format: str, dim: int) -> tuple[Tensor, Tensor]:
    """Codes like x, and scales (fp32, or E8M0 as uint8) with one entry along `dim`, the one that a group runs along."""
    x = x.float()
    largest = x.abs().amax(dim, keepdim=True)
    finite, empty = largest.isfinite(), largest < TINY
    scale = _int8_scale(largest) if format == "int8" else _fp8_scale(largest)
    y = torch.where(finite & ~empty, x / scale, 0.0)
    if format == "int8":
        return y.round().to(torch.int8), scale
    exponent = (scale.view(torch.int32) >> 23).to(torch.uint8)
    return y.to(FP8), torch.where(finite, exponent, FP8_NAN)


def dequantise(codes: Tensor, scales: Tensor, format: str) -> Tensor:
    """The reverse of `quantise`, in fp32; scales broadcast along the groups."""
    if format == "int8":
        return codes.float() * scales
    exponent = scales.int()
    return codes.float() * torch.where(exponent == FP8_NAN, torch.nan, (exponent << 23).view(torch.float32))


def _int8_scale(largest: Tensor) -> Tensor:
    """largest / 127, up to the next number of 16 significant bits."""
    scale = (((largest / 127).view(torch.int32) + 0xFF) & ~0xFF).view(torch.float32)
    return torch.where(largest.isfinite(), torch.where(largest < TINY, 0.0, scale), torch.nan)


def _fp8_scale(largest: Tensor) -> Tensor:
    """The power of two that brings `largest` into (232, 464]: what is rounded to at most 448, and stays in there."""
    raised = largest.view(torch.int32) + 0x17FFFF  # the exponent is one higher from a mantissa of 1.8125 on
    return torch.where(largest < TINY, 0, ((raised >> 23) - 8) << 23).view(torch.float32)
