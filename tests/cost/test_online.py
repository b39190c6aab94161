"""The cost model of a running engine: learnt from its steps, soon after they change."""

from __future__ import annotations

import random

import numpy as np
import pytest

from tests.cost.machine import PRICES, mixed, steps
from xllm.cost.observations import MeasuredMove, Profile, StepWork, decode_work, prefill_work, work_of
from xllm.cost.online import MIN_PREFILL_TOKENS, OnlineCost

WORKS = [prefill_work(700), prefill_work(4256, 4000), decode_work([300] * 8),
         mixed(prefill_work(128), decode_work([9]))]


def learnt(observed) -> OnlineCost:
    cost = OnlineCost()
    for work, seconds in observed:
        cost.note_step(work, seconds)
    return cost


def assert_predicts(cost: OnlineCost, factor: float = 1.0, rel: float = 0.1) -> None:
    prices = cost.prices()
    assert prices is not None
    for work in WORKS:
        assert prices.predict(work) == pytest.approx(factor * PRICES.predict(work), rel=rel)


def test_it_says_nothing_before_it_has_seen_anything() -> None:
    cost = OnlineCost()
    assert cost.prices() is cost.last is cost.last_predicted_s is cost.prefill_s(9) is cost.move_s("load", 9) is None
    assert cost.error.num == 0 and cost.model.steps is None


@pytest.mark.parametrize("outliers", [0.0, 0.1])
def test_the_cost_of_a_step_is_learnt(outliers: float) -> None:
    cost = learnt(steps(400, noise=0.05, outliers=outliers))
    assert_predicts(cost)
    assert 0.0 < cost.error.median < 0.1 and cost.error.num == 256
    assert cost.model.steps == cost.prices()


def test_a_slower_machine_is_noticed_within_two_blocks() -> None:
    cost = learnt([*steps(900, noise=0.05), *steps(32, seed=1, noise=0.05, factor=3.0)])
    assert_predicts(cost, 3.0)
    for work, seconds in steps(2000, seed=2, noise=0.05, factor=0.5):
        cost.note_step(work, seconds)
    assert_predicts(cost, 0.5)
    assert cost.error.median < 0.1


def test_steps_of_one_size_tell_nothing_of_the_step_itself() -> None:
    cost = learnt([(prefill_work(2048), 0.2)] * 100)
    found = cost.prices()
    assert found is not None and found.step < 0.03
    assert found.predict(prefill_work(2048)) == pytest.approx(0.2, rel=0.01)
    for _ in range(32):  # short steps are believed soon, though the long ones are still known
        cost.note_step(StepWork(num_prefill_tokens=4), 0.0024)
    found = cost.prices()
    assert found is not None and found.step == pytest.approx(0.002, rel=0.15)
    assert found.predict(prefill_work(2048)) == pytest.approx(0.2, rel=0.1)


def test_long_contexts_cost_what_they_cost() -> None:
    """Decoding rows only, whose contexts grow: what grows is the reading, not the step. A row counts as its token."""
    works = [decode_work([length] * (90 if length % 3 else 30)) for length in range(1000)]
    found = learnt((work, PRICES.predict(work)) for work in works).prices()
    assert found is not None and found.step == pytest.approx(PRICES.step, rel=0.2)
    assert found.token + found.row == pytest.approx(PRICES.token + PRICES.row, rel=0.1)
    assert found.token > 5 * found.row
    assert found.read + found.decode_read == pytest.approx(PRICES.read + PRICES.decode_read, rel=0.1)


def test_what_a_prompt_adds_is_known_once_one_was_computed() -> None:
    cost = learnt((decode_work([i]), 0.01) for i in range(50))
    assert cost.prefill_s(100) is None
    cost.note_step(prefill_work(MIN_PREFILL_TOKENS), 0.1)
    assert cost.prefill_s(200) > cost.prefill_s(200, 100) > 0.0  # type: ignore[operator]


def test_a_profile_holds_from_the_start_and_is_outweighed_by_what_is_measured() -> None:
    """By steps at once, in all parts, though those that follow are of one kind."""
    cost = OnlineCost()
    cost.start(Profile(list(steps(300, noise=0.05)), [MeasuredMove("transfer", 1e6, 5e-3)] * 3))
    assert_predicts(cost)
    assert cost.prefill_s(700) == pytest.approx(PRICES.predict(prefill_work(700)) - PRICES.step, rel=0.1)
    assert cost.move_s("transfer", 1e6) == pytest.approx(5e-3, rel=0.05)
    assert cost.error.num == 0, "of this engine, nothing was predicted yet"
    for _ in range(32):
        work = decode_work([300] * 8)
        cost.note_step(work, 3 * PRICES.predict(work))
    assert cost.error.num == 32 and cost.error.median > 0.3
    assert_predicts(cost, 3.0, rel=0.25)
    for work, seconds in steps(2000, seed=2, noise=0.05, factor=0.5):
        cost.note_step(work, seconds)
    assert_predicts(cost, 0.5)
    empty = OnlineCost()
    empty.start(Profile())
    assert empty.prices() is None


def test_moves_are_learnt_and_long_ones_are_several() -> None:
    cost, dice = OnlineCost(), random.Random(0)
    for _ in range(300):
        size = dice.uniform(5e5, 1.5e6)
        cost.note_move("save", size, 1e-3 + size / 1e9)
    assert cost.move_s("save", 8e5) == pytest.approx(1.8e-3, rel=0.05)
    assert cost.move_s("save", 1e8) == pytest.approx(100e-3 + 100e-3, rel=0.2), "each of the usual size has its start"
    assert cost.move_s("load", 1.0) is None
    assert cost.model.moves_error["save"].median < 0.1


def test_the_sums_of_a_plan() -> None:
    """Whatever rows it has, as the tokens one by one would have it."""
    dice = random.Random(5)
    for _ in range(100):
        rows = [(dice.choice([1, 1, 1, 7, 200]), dice.randrange(3000)) for _ in range(dice.randint(1, 9))]
        tokens, context = np.array(rows, dtype=np.int32).T
        prefills = [prefill_work(n + c, c) for n, c in rows if n > 1]
        decodes = decode_work([c for n, c in rows if n == 1])
        assert work_of(tokens, context) == pytest.approx(mixed(*prefills, decodes))
    assert work_of(np.array([1, 1]), np.array([10, 20]), 4) == (0, 0, 2, 6, 90)
