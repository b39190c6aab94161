"""A device that computes nothing: fixed tokens, and a clock that moves only when a step is run.

It lets the real scheduler and KV code run at any scale without a model. The token after position p
of a sequence is a hash of its seed and p, so that what a request must return is known beforehand.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


class VirtualClock:
    """Seconds that pass only by `advance`. Call it like `time.monotonic`."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def advance(self, seconds: float) -> None:
        self.now_s += seconds


@dataclass(frozen=True, kw_only=True)
class NullTimes:
    """How long the device says that a step takes: base_s + per_token_s * T + per_sequence_s * S."""

    base_s: float = 1e-3
    per_token_s: float = 1e-5
    per_sequence_s: float = 1e-5

    def step_s(self, num_tokens: int, num_sequences: int) -> float:
        return self.base_s + self.per_token_s * num_tokens + self.per_sequence_s * num_sequences


def fixed_tokens(seeds: np.ndarray, positions: np.ndarray, vocab_size: int) -> np.ndarray:
    """The token that follows position p under a seed: int32, by SplitMix64 (Steele et al. 2014)."""
    x = seeds.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + positions.astype(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x ^ (x >> np.uint64(31))) % np.uint64(vocab_size)).astype(np.int32)
