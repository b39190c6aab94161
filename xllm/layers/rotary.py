"""The table of rotary cosines and sines that `ops.qkv_rope_write` reads.

Letters: L positions, H head dim. Frequencies and angles are computed in fp32, the way transformers
does, so that large positions round alike.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from xllm.layers.rope_config import RopeConfig


def rope_table(rope: RopeConfig, head_dim: int, num_positions: int, device: torch.device) -> Tensor:
    """cos_sin_LH: fp32 [num_positions, head_dim], cosines of the head_dim / 2 angles, then sines,
    multiplied by the attention factor. Angles of numbers that are not rotated come last, and are zero."""
    rotated_dim = rope.rotated_dim(head_dim)
    frequencies = {"default": _default, "linear": _linear, "dynamic": _dynamic, "llama3": _llama3, "yarn": _yarn}
    positions_L1 = torch.arange(num_positions, dtype=torch.float32)[:, None]
    angles_LH2 = positions_L1 * frequencies[rope.rope_type](rope, rotated_dim, positions_L1)
    cos_LH2, sin_LH2 = angles_LH2.cos() * rope.attention_factor, angles_LH2.sin() * rope.attention_factor
    rest = 0, (head_dim - rotated_dim) // 2
    return torch.cat((pad(cos_LH2, rest, value=1.0), pad(sin_LH2, rest)), dim=-1).to(device)


def paired_order(head_dim: int, rotated_dim: int) -> Tensor | None:
    """The order of a head's numbers in which those that are rotated together stand half a head apart, as
    `ops.qkv_rope_write` wants them; int64 [head_dim], None where they do.

    Of a head that is rotated in part, a checkpoint has the two halves of that part first. Scores are sums over a head's
    numbers, so that queries and keys in another order, both in the same, give the same: with the rows of their
    projections (and what norms them) put in this order once, and a table that leaves the rest as it is, no operator
    needs to know.
    """
    if rotated_dim == head_dim:
        return None
    rotated, rest = torch.arange(rotated_dim).chunk(2), torch.arange(rotated_dim, head_dim).chunk(2)
    return torch.cat((rotated[0], rest[0], rotated[1], rest[1]))


def _exponents(head_dim: int) -> Tensor:
    return torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim


def _default(rope: RopeConfig, head_dim: int, _: Tensor) -> Tensor:
    return 1.0 / rope.theta ** _exponents(head_dim)


def _linear(rope: RopeConfig, head_dim: int, positions_L1: Tensor) -> Tensor:
    """Position interpolation: all frequencies divided by the factor."""
    return _default(rope, head_dim, positions_L1) / rope.factor


def _dynamic(rope: RopeConfig, head_dim: int, positions_L1: Tensor) -> Tensor:
    """NTK scaling whose base grows with the sequence: one row of frequencies per position, [L, H/2].

    Row p holds the frequencies of a sequence of p + 1 tokens. Up to the original length that is
    plain rope. Beyond it, it is what transformers rotates token p with when it generates token by
    token over a KV cache. A prompt that is itself longer than the original length differs:
    transformers rotates all of it with the frequencies of its full length, which makes a token's
    keys depend on how many tokens follow; no cache of prefixes or chunks could then be exact.
    """
    lengths_L1 = (positions_L1 + 1.0).clamp_min(float(rope.original_max_len))
    growth_L1 = (rope.factor * lengths_L1 / rope.original_max_len) - (rope.factor - 1.0)
    theta_L1 = rope.theta * growth_L1 ** (head_dim / (head_dim - 2))
    return 1.0 / theta_L1 ** _exponents(head_dim)


def _llama3(rope: RopeConfig, head_dim: int, positions_L1: Tensor) -> Tensor:
    """Llama 3.1: long wavelengths are divided by the factor, short ones kept, with a ramp between."""
    plain = _default(rope, head_dim, positions_L1)
    turns = rope.original_max_len / (2 * math.pi / plain)
    keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    keep = keep.clamp(0.0, 1.0)
    return (1 - keep) * plain / rope.factor + keep * plain


def _yarn(rope: RopeConfig, head_dim: int, positions_L1: Tensor) -> Tensor:
    """YaRN (Peng et al., 2023): frequencies that turn more than `beta_fast` times within the original
    length are kept, those that turn less than `beta_slow` times are interpolated, with a ramp between."""
    plain = _default(rope, head_dim, positions_L1)
    low, high = (_dim_of_turns(rope, head_dim, turns) for turns in (rope.beta_fast, rope.beta_slow))
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low if high != low else 0.001
    interpolate = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0.0, 1.0)
    return plain / rope.factor * interpolate + plain * (1 - interpolate)


def _dim_of_turns(rope: RopeConfig, head_dim: int, turns: float) -> float:
    """The (fractional) dimension whose angle turns that many times within the original length."""
    return head_dim * math.log(rope.original_max_len / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))
