"""What a call does whose instance is gone, and whose fault that was."""

from __future__ import annotations

import pytest

from xllm.routing.recovery import MAX_TAKEN, MAX_WAIT_S, Interrupted, Present, blamed, is_suspect, next_step

LATE = {"waited_s": MAX_WAIT_S}
NOWHERE = {"has_place": False}


@pytest.mark.parametrize(("expected", "fields"), [
    ("recompute", {}),
    ("recompute", {"num_lost": 2, "num_taken": 2, "num_counted": 2}),
    ("give up", {"num_lost": 3, "num_taken": 3, "num_counted": 3}),
    ("recompute", {"num_lost": 5, "num_taken": 5, "num_counted": 2}),
    ("give up", {"num_lost": MAX_TAKEN, "num_taken": MAX_TAKEN}),
    ("recompute", {"num_lost": 50}),  # none of them had begun
    ("recompute", {"num_lost": 2, **LATE}),
    ("give up", {"num_lost": 3, **LATE}),
    ("wait", NOWHERE),
    ("give up", NOWHERE | LATE),
    ("wait", NOWHERE | {"awaits_turn": True} | LATE),
    ("pass on", NOWHERE | {"was_refused": True, "was_taken": False}),
    ("wait", NOWHERE | {"was_refused": True}),
], ids=lambda value: value if isinstance(value, str) else ",".join(f"{k}={v}" for k, v in value.items()))
def test_the_next_step(expected: str, fields: dict) -> None:
    assert next_step(Interrupted(**{
        "num_lost": 1, "num_taken": 0, "num_counted": 0, "was_taken": True, "was_refused": False, "has_place": True,
        "awaits_turn": False, "waited_s": 0.0, **fields})) == expected


def test_whose_fault_it_may_have_been() -> None:
    assert [is_suspect(number) for number in range(4)] == [False, False, True, True]
    waits, runs, tried = Present(False, False), Present(True, False), Present(True, True)
    assert blamed([waits, runs, runs]) == [False, True, True]
    assert blamed([runs, tried, waits]) == [False, True, False]
    assert blamed([runs, Present(False, True)]) == [True, False], "its trial had not begun"
