"""Shares of a step, of the rows and of the blocks, where tenants share fairly."""

from __future__ import annotations

import random

import numpy as np
import pytest

from xllm.scheduler.shares import QUANTUM, SLOWER, deal, limit_rows, seconds_of_step, who_gives, who_yields

STEP_S, TOKEN_S = 0.002, 0.0001
EQUAL = np.ones(2)


def floats(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float64)


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
