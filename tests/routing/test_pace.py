"""How fast an instance computes, learnt from the steps that it reports."""

from __future__ import annotations

import random

import pytest

from xllm.routing.pace import FEWEST_STEPS, PaceFit, Timing


def steps(number: int, step_s: float, token_s: float, sequence_s: float, seed: int = 0) -> list[Timing]:
    rng, found = random.Random(seed), list[Timing]()
    for place in range(number):
        num_seqs, num_prompt = rng.randrange(1, 60), rng.choice([0, 0, 100, 500])
        seconds = (step_s + token_s * num_prompt + sequence_s * num_seqs) * rng.uniform(0.95, 1.05)
        found.append((float(place), seconds, num_prompt + num_seqs, num_seqs))
    return found


def test_prices_are_found_and_follow_the_machine() -> None:
    pace = PaceFit()
    pace.note([])
    pace.note([(0.0, 0.0, 5, 5)] * 20)
    pace.note(steps(FEWEST_STEPS - 1, 0.01, 1e-4, 2e-4))
    assert pace.prices is None, "too few to say, or without a duration"
    pace.note(steps(300, 0.01, 1e-4, 2e-4, seed=1))
    assert pace.prices is not None
    assert pace.prices == pytest.approx((0.01, 1e-4, 2e-4), rel=0.15)
    for seed in range(10):
        pace.note(steps(300, 0.02, 2e-4, 4e-4, seed))
    assert pace.prices == pytest.approx((0.02, 2e-4, 4e-4), rel=0.15)


def test_what_never_occurred_has_no_price() -> None:
    pace = PaceFit()
    pace.note([(0.0, 0.012, 10, 10)] * 50)
    assert pace.prices is not None
    assert pace.prices.token_s == 0.0
    assert pace.prices.step_s + 10 * pace.prices.sequence_s == pytest.approx(0.012, rel=0.05)
