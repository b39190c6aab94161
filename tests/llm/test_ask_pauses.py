"""For how long an instance that does not answer is not asked for room."""

from __future__ import annotations

import pytest

from xllm.client.ask_pauses import AskPauses

D = ("d", "1")


@pytest.mark.parametrize(("told", "pauses"), [
    ("s0 s4 s12 s28", [(0, 4), (4, 12), (12, 28), (28, 60)]),
    ("s0 s4 s12 s28 s60 s120", [(60, 120), (120, 180)]),  # never longer than a minute
    ("s0 s0.5 s1", [(0, 4)]),  # asked together
    ("s0 s4 a5 s6", [(6, 10)]),  # an answer
    ("s0 s100", [(100, 108)]),  # however long nobody asked
    ("s0 a1", []), ("a1", []), ("", [])])
def test_pauses(told: str, pauses: list[tuple[float, float]]) -> None:
    asked, events = AskPauses(), told.split()
    for event in events:
        at_s = float(event[1:])
        if event[0] == "a":
            asked.answered(D)
        else:
            until_s = at_s + asked.silent(D, at_s)
            known = [end for begin, end in pauses if begin <= at_s < end]
            assert not known or until_s == known[0]
            assert asked.names(until_s - 0.01) == {"d"} and asked.names(until_s) == set()
    last_s = float(events[-1][1:]) if events else 0.0
    assert asked.names(last_s) == ({"d"} if any(begin <= last_s < end for begin, end in pauses) else set())


def test_each_for_itself_and_each_life_of_it() -> None:
    asked = AskPauses()
    asked.silent(D, 0.0)
    assert asked.silent(("e", None), 1.0) == 4.0
    assert asked.names(2.0) == {"d", "e"}
    asked.keep([("d", "2"), ("e", None)])
    assert asked.names(2.0) == {"e"}
    assert asked.silent(("d", "2"), 4.0) == 4.0
    asked.answered(D)  # of a life that is over
    assert asked.names(5.0) == {"d"}
