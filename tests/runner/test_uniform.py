"""The uniform numbers: the published generator, flat, and unrelated between neighbouring seeds and positions."""

from __future__ import annotations

import numpy as np
import pytest

from xllm.runner.uniform import uniforms

GAMMA, MASK = 0x9E3779B97F4A7C15, 2**64 - 1
# The first outputs of SplitMix64 seeded with 1234567, as published with many of its implementations.
PUBLISHED = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]


def splitmix64(state: int) -> int:
    """The output for an already advanced state, in plain integers."""
    z = state
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_the_plain_one_is_splitmix64() -> None:
    assert [splitmix64((1234567 + (i + 1) * GAMMA) & MASK) for i in range(5)] == PUBLISHED


@pytest.mark.parametrize("seed", [0, 1, 1234567, 2**63, 2**64 - 1])
def test_equals_the_plain_one(seed: int) -> None:
    positions = np.array([0, 1, 2, 77, 2**31 - 1])
    start = splitmix64((seed + GAMMA) & MASK)
    expected = [(splitmix64((start + (p + 1) * GAMMA) & MASK) >> 40) / 2**24 for p in positions.tolist()]
    found = uniforms(np.full(5, seed, dtype=np.uint64), positions)
    assert found.dtype == np.float32
    assert found.tolist() == expected
    assert (found < 1.0).all()


@pytest.mark.parametrize("along", ["seeds", "positions"])
def test_flat_and_uncorrelated(along: str) -> None:
    count = np.arange(100_000)
    zero = np.zeros_like(count)
    seeds, positions = (count, zero + 3) if along == "seeds" else (zero + 42, count)
    u = uniforms(seeds.astype(np.uint64), positions).astype(np.float64)
    histogram, _ = np.histogram(u, bins=100, range=(0.0, 1.0))
    chi_squared = float(((histogram - 1000.0) ** 2 / 1000.0).sum())
    assert 50.0 < chi_squared < 165.0  # 99 degrees of freedom; 165: p = 4e-5
    for lag in (1, 2, 16):
        assert abs(np.corrcoef(u[:-lag], u[lag:])[0, 1]) < 0.015
