"""Shares of a step, of the rows and of the blocks, where tenants share fairly."""

from __future__ import annotations

import random

import numpy as np
import pytest

from xllm.scheduler.shares import QUANTUM, SLOWER, deal, limit_rows, longest_step, tokens_of_step, who_yields
from xllm.scheduler.step_cost import StepCost

LINE = (0.002, 0.0001)  # seconds: of a step, and of a token more
EQUAL = np.ones(2)


def floats(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float64)


def test_the_cost_of_a_step_is_learnt() -> None:
    cost, dice = StepCost(), random.Random(1)
    assert cost.line() is None
    for _ in range(60):
        tokens = dice.choice([1, 2, 16, 64, 256, 2048])
        cost.note(tokens, (0.002 + 0.0001 * tokens) * dice.uniform(0.95, 1.05))
    assert cost.line() == pytest.approx(LINE, rel=0.15)


def test_steps_of_one_size_tell_nothing_of_the_base() -> None:
    cost = StepCost()
    for _ in range(100):
        cost.note(2048, 0.2)
    assert cost.line() == pytest.approx((0.0, 0.2 / 2048))
    for _ in range(30):  # short steps are believed soon, though the long ones are still known
        cost.note(4, 0.0024)
    base, per_token = cost.line() or (0.0, 0.0)
    assert base == pytest.approx(0.002, rel=0.1) and per_token == pytest.approx(0.0001, rel=0.1)


def test_what_is_cheap_is_not_limited() -> None:
    """A device whose step takes as long for 256 tokens as for one."""
    assert tokens_of_step(floats(1, 255), EQUAL, (0.01, 0.00001)) is None
    assert tokens_of_step(floats(0, 4096), EQUAL, LINE) is None, "who is alone has all"
    assert tokens_of_step(floats(64, 64), EQUAL, LINE) is None


@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 1.0), (0.1, 1.0)])
def test_nobody_falls_below_its_share_of_the_time(weights: tuple[float, float]) -> None:
    weight = floats(*weights)
    for demand in (floats(1, 4096), floats(16, 256), floats(300, 4096)):
        found = tokens_of_step(demand, weight, LINE)
        assert found is not None or weights[0] < 1, "a caller of little weight asks for little"
        allowed = demand if found is None else found
        assert (allowed >= 1).all() and (allowed <= demand).all()
        step_s = LINE[0] + LINE[1] * allowed.sum()
        alone_s = LINE[0] + LINE[1] * demand[0]
        exact_s = alone_s * weight.sum() / weight[0]
        assert step_s * demand[0] / allowed[0] <= SLOWER * exact_s * 1.5, "its tokens per second, in parts of its share"


def test_dealing_wastes_nothing() -> None:
    dice = random.Random(2)
    for _ in range(300):
        demand = floats(*(dice.choice([0, 1, 5, 50, 500]) for _ in range(5)))
        weight = floats(*(dice.choice([0.5, 1, 2]) for _ in range(5)))
        total = dice.choice([5, 20, 100, 1000])
        given = deal(demand, weight, total)
        assert (given <= demand).all() and ((given > 0) == (demand > 0)).all()
        assert given.sum() >= min(total, demand.sum()) - 5
        assert given.sum() <= max(total, (demand > 0).sum()) + 5
        hungry = given < demand
        if hungry.sum() > 1:  # what they have is in proportion to their weights
            parts = (given / weight)[hungry & (given > 1)]
            assert not len(parts) or parts.max() - parts.min() <= 2 + 1 / weight.min()


def test_rows_of_a_limited_tenant_take_turns() -> None:
    slots, wanted = np.array([0, 1, 1, 1, 0]), np.array([1, 1, 1, 100, 1])
    last = np.array([9, 7, 3, 5, 9])
    limit = limit_rows(wanted, slots, last, floats(2, 102), np.array([2, 40]))
    assert limit.tolist() == [1, 0, 1, 39, 1]


def test_a_step_is_no_longer_than_a_newcomer_can_bear() -> None:
    assert longest_step(LINE) == 1979 or longest_step(LINE) == 1980
    assert longest_step((1.0, 0.1)) == 0 and longest_step((0.1, 0.0)) > 10**6


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
