"""A machine whose steps cost what its prices say, with noise and outliers."""

from __future__ import annotations

import random
from collections.abc import Iterator

from xllm.cost.cost_model import StepPrices
from xllm.cost.observations import MeasuredStep, StepWork, decode_work, prefill_work

PRICES = StepPrices(step=2e-3, token=1e-4, row=5e-5, read=2e-8, decode_read=1e-7)


def mixed(*works: StepWork) -> StepWork:
    return StepWork(*map(sum, zip(*works, strict=True)))


def steps(num: int, *, seed: int = 0, noise: float = 0.0, outliers: float = 0.0,
          factor: float = 1.0) -> Iterator[MeasuredStep]:
    """Prefills, decodes and both. noise: relative, uniform; outliers: their share, each 3 to 50 times too slow."""
    dice = random.Random(seed)
    for _ in range(num):
        prefill = prefill_work(dice.choice([16, 128, 700, 2048]), 0)
        decode = decode_work([dice.choice([10, 300, 2000])] * dice.choice([1, 4, 32]))
        cached = dice.choice([0, 500, 4000])
        chunk = prefill_work(cached + 256, cached)
        work = dice.choice([prefill, decode, chunk, mixed(prefill, decode), mixed(chunk, decode)])
        slow = dice.uniform(3, 50) if dice.random() < outliers else 1.0
        yield MeasuredStep(work, PRICES.predict(work) * dice.uniform(1 - noise, 1 + noise) * factor * slow)
