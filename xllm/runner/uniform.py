"""The uniform number behind each sampled token: a pure function of (seed, position).

Nothing else enters, so what a request draws does not depend on its batch, on preemption, on how its
prompt was cut into chunks, or on speculation.

SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators") is
counter-based: its i-th output is mix(start + (i + 1) * gamma). The start is itself a mixed seed, so
that neighbouring seeds do not give shifted copies of one stream.
"""

from __future__ import annotations

import numpy as np

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)
_ONE_ULP = np.float32(2.0**-24)


def uniforms(seed_Q: np.ndarray, position_Q: np.ndarray) -> np.ndarray:
    """float32 [Q] in [0, 1), multiples of 2^-24. seed uint64; position: index in the sequence of the
    token to draw (the first after a prompt of n tokens has position n)."""
    start_Q = _mix(seed_Q + _GAMMA)
    bits_Q = _mix(start_Q + (position_Q.astype(np.uint64) + np.uint64(1)) * _GAMMA)
    return (bits_Q >> np.uint64(40)).astype(np.float32) * _ONE_ULP


def _mix(z: np.ndarray) -> np.ndarray:
    """The 64-bit finaliser of SplitMix64; arithmetic is modulo 2^64."""
    z = (z ^ (z >> np.uint64(30))) * _FIRST
    z = (z ^ (z >> np.uint64(27))) * _SECOND
    return z ^ (z >> np.uint64(31))
