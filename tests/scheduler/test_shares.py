"""Shares of a step, of the rows and of the blocks, where tenants share fairly."""

from __future__ import annotations

import random

import numpy as np
import pytest

from xllm.scheduler.shares import QUANTUM, SLOWER, deal, limit_rows, seconds_of_step, who_gives, who_yields
from xllm.scheduler.step_cost import Prices, StepCost

PRICES = Prices(0.002, 0.0001, 0.000001)
STEP_S, TOKEN_S = PRICES.step, PRICES.token
EQUAL = np.ones(2)


def floats(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float64)


def seconds(tokens: int, reads: int, prices: Prices = PRICES) -> float:
    return prices.step + prices.token * tokens + prices.read * reads


def test_the_cost_of_a_step_is_learnt() -> None:
    cost, dice = StepCost(), random.Random(1)
    assert cost.prices() is None
    for _ in range(200):
        tokens = dice.choice([1, 2, 16, 64, 256, 2048])
        reads = tokens * dice.choice([10, 100, 1000])
        cost.note(tokens, reads, seconds(tokens, reads) * dice.uniform(0.95, 1.05))
    assert cost.prices() == pytest.approx(PRICES, rel=0.15)


def test_steps_of_one_size_tell_nothing_of_the_step_itself() -> None:
    cost = StepCost()
    for _ in range(100):
        cost.note(2048, 0, 0.2)
    found = cost.prices()
    assert found is not None and found.step < 0.03 and seconds(2048, 0, found) == pytest.approx(0.2, rel=0.01)
    for _ in range(32):  # short steps are believed soon, though the long ones are still known
        cost.note(4, 0, 0.0024)
    found = cost.prices()
    assert found is not None and found.step == pytest.approx(0.002, rel=0.1)
    assert found.token == pytest.approx(0.0001, rel=0.1)


def test_long_contexts_cost_what_they_cost() -> None:
    """Decoding rows only, whose contexts grow: what grows is the reading, not the step."""
    cost = StepCost()
    for length in range(1000):
        num = 90 if length % 3 else 30
        cost.note(num, num * length, seconds(num, num * length))
    assert cost.prices() == pytest.approx(PRICES, rel=0.1)


def test_a_slower_machine_is_noticed() -> None:
    cost, dice = StepCost(), random.Random(4)
    for factor, times in ((1.0, 900), (3.0, 24)):
        for _ in range(times):
            tokens = dice.choice([1, 16, 256])
            cost.note(tokens, 9 * tokens, factor * seconds(tokens, 9 * tokens))
    found = cost.prices()
    assert found is not None and seconds(64, 600, found) == pytest.approx(3 * seconds(64, 600), rel=0.1)


def test_what_is_cheap_is_not_limited() -> None:
    """A device whose step takes as long for 256 tokens as for one."""
    assert seconds_of_step(floats(1, 255) * 1e-5, EQUAL, 0.01) is None
    assert seconds_of_step(floats(0, 4096) * TOKEN_S, EQUAL, STEP_S) is None, "who is alone has all"
    assert seconds_of_step(floats(64, 64) * TOKEN_S, EQUAL, STEP_S) is None


@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 1.0), (0.1, 1.0)])
def test_nobody_falls_below_its_share_of_the_time(weights: tuple[float, float]) -> None:
    weight = floats(*weights)
    for tokens in (floats(1, 4096), floats(16, 256), floats(300, 4096)):
        demand = tokens * TOKEN_S
        found = seconds_of_step(demand, weight, STEP_S)
        assert found is not None or weights[0] < 1, "a caller of little weight asks for little"
        allowed = demand if found is None else found
        assert (allowed > 0).all() and (allowed <= demand).all()
        step_s = STEP_S + allowed.sum()
        exact_s = (STEP_S + demand[0]) * weight.sum() / weight[0]
        assert step_s * demand[0] / allowed[0] <= SLOWER * exact_s * 1.5, "its tokens per second, in parts of its share"


def test_dealing_wastes_nothing() -> None:
    dice = random.Random(2)
    for _ in range(300):
        demand = floats(*(dice.choice([0, 1, 5, 50, 500]) for _ in range(5)))
        weight = floats(*(dice.choice([0.5, 1, 2]) for _ in range(5)))
        total = dice.choice([5, 20, 100, 1000])
        given = deal(demand, weight, total)
        assert (given <= demand).all() and ((given > 0) == (demand > 0)).all()
        assert given.sum() == pytest.approx(min(total, demand.sum()))
        hungry = given < demand
        if hungry.sum() > 1:  # what they have is in proportion to their weights
            parts = (given / weight)[hungry]
            assert parts.max() == pytest.approx(parts.min())


def test_rows_of_a_limited_tenant_take_turns() -> None:
    slots, wanted = np.array([0, 1, 1, 1, 0]), np.array([1, 1, 1, 100, 1])
    last, price = np.array([9, 7, 3, 5, 9]), floats(1, 1, 1, 0.5, 1)
    limit = limit_rows(wanted, price, slots, last, floats(2, 52), floats(2, 21))
    assert limit.tolist() == [1, 0, 1, 40, 1]
    assert limit_rows(wanted, price, slots, last, floats(2, 52), floats(0.1, 0.1)).tolist() == [1, 0, 1, 0, 0]


def test_blocks_are_taken_from_who_has_most() -> None:
    assert who_gives(0, floats(0.1, 0.9), np.array([3, 9]), EQUAL) == 1
    assert who_gives(1, floats(0.1, 0.9), np.array([3, 9]), EQUAL) == 1, "its own later rows"
    assert who_gives(0, floats(0.5, 0.5), np.array([3, 9]), EQUAL) is None
    assert who_gives(0, floats(0.1, 0.9), np.array([3, 1]), EQUAL) is None, "nobody's only row"
    assert who_gives(0, floats(0.3, 0.65), np.array([3, 3]), floats(1, 3)) == 0


def who(slot: int, rows: list[int], weights: list[float], served: list[float] | None = None, num_rows: int = 8,
        use: list[float] | None = None) -> int | None:
    counts = np.array(rows)
    return who_yields(slot, floats(*use) if use else counts / num_rows, counts, floats(*weights),
                      floats(*(served or [0] * len(rows))), 1 / num_rows)


def test_who_has_too_much_makes_room_and_nobody_else() -> None:
    assert who(0, [0, 8], [1, 1]) == 1
    assert who(0, [3, 5], [1, 1]) == 1
    assert who(0, [4, 4], [1, 1]) is None and who(1, [4, 4], [1, 1]) is None, "no quarrel about equal parts"
    assert who(0, [1, 7], [1, 3]) == 1 and who(0, [2, 6], [1, 3]) is None
    assert who(0, [0, 6, 2], [1, 1, 1]) == 1, "the one farthest beyond its share"
    assert who(1, [0, 8], [1, 1]) is None, "whoever has all asks for more"
    assert who(0, [0, 2], [1, 1], use=[0.0, 0.9]) == 1, "blocks count as rows do"


def test_more_tenants_than_rows_take_turns() -> None:
    assert who(0, [0, 1, 1], [1, 1, 1], num_rows=2) is None
    assert who(0, [0, 1, 1], [1, 1, 1], [0, QUANTUM - 1, 5], num_rows=2) is None
    assert who(0, [0, 1, 1], [1, 1, 1], [0, 5, QUANTUM + 1], num_rows=2) == 2


def test_preemption_comes_to_rest() -> None:
    """Whatever the weights and the order in which they ask, after a while nobody takes anybody's row."""
    dice = random.Random(3)
    for _ in range(200):
        num_rows, num_tenants = dice.choice([1, 2, 3, 7, 16]), dice.choice([2, 3, 5])
        weights = [dice.choice([0.5, 1, 2]) for _ in range(num_tenants)]
        rows = [0] * num_tenants
        rows[0] = num_rows
        for _ in range(60 * num_tenants):
            asking = dice.randrange(num_tenants)
            victim = who(asking, rows, weights, num_rows=num_rows)
            if victim is not None:
                rows[victim] -= 1
                rows[asking] += 1
        assert all(who(tenant, rows, weights, num_rows=num_rows) is None for tenant in range(num_tenants))
        if num_tenants <= num_rows:
            assert min(rows) >= 1
