"""Which pair computes a call: a case for every rule, what must hold of every choice, and what a fleet makes of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.routing.test_fleet import BLOCK, fleet_of, joined, marked, report, tokens
from tests.routing.test_policies import call_of, place, snapshot_of
from xllm.routing.fleet import Fleet
from xllm.routing.global_index import GlobalIndex
from xllm.routing.pair_snapshot import PairDecision, PairSnapshot
from xllm.routing.pairs import choose_pair
from xllm.routing.prompt_marks import NO_MARKS
from xllm.routing.roles import HANDS_OVER, ROLES, TAKES_OVER

Side = dict[str, Any]
MOVE_START_S = 0.001


def side(role: str, queue: float = 0.0, prefill: float = 0.2, move: float = 0.05, step: float = 0.02, running: int = 1,
         num_open: int = 0, free: int = 10**6, full: bool = False, stale: bool = False) -> Side:
    return {**locals(), "running": 0 if role == "PREFILL" else running}


def view(sides: list[Side], prefill_turn: int = 0) -> PairSnapshot:
    def column(name: str) -> np.ndarray:
        return np.array([one[name] for one in sides], dtype=np.float64)

    fleet = snapshot_of([place(num_open=one["num_open"], free=one["free"], full=one["full"], stale=one["stale"])
                         for one in sides])
    return PairSnapshot(fleet=fleet, roles=tuple(one["role"] for one in sides), queue_s=column("queue"),
                        prefill_s=column("prefill"), move_s=column("move"),
                        move_start_s=np.full(len(sides), MOVE_START_S), next_token_s=column("step"),
                        num_running=column("running"), prefill_turn=prefill_turn)


P, D, MIX, ANY = "PREFILL", "DECODE", "MIX", "DEFAULT"
CASES: dict[str, tuple[list[Side], tuple[str | None, str | None, str]]] = {
    "the usual": ([side(P), side(D)], ("a", "b", "pair")),
    "the shortest queue": ([side(P, queue=0.5), side(P), side(D)], ("b", "c", "pair")),
    "who has the prompt cached": ([side(P, queue=0.1, prefill=0.01), side(P), side(D)], ("a", "c", "pair")),
    "a queue that costs more than what is cached": ([side(P, queue=0.3, prefill=0.01), side(P), side(D)],
                                                    ("b", "c", "pair")),
    "what is cached at the decode side need not travel": ([side(P), side(D, move=0.5), side(D, move=0.3, step=0.03)],
                                                          ("a", "c", "pair")),
    "what travels while the prompt is computed costs nothing": (
        [side(P), side(D, move=0.2), side(D, move=0.01, step=0.021)], ("a", "b", "pair")),
    "a slow link": ([side(P), side(D, move=9.0), side(D)], ("a", "c", "pair")),
    "the target between tokens before the sum": ([side(P), side(D, move=0.001, step=0.06), side(D, move=0.4)],
                                                 ("a", "c", "pair")),
    "the target of the first token before the sum": (
        [side(P, queue=0.9), side(P, queue=0.75), side(D, step=0.04), side(D, move=0.9, step=0.03)],
        ("b", "c", "pair")),
    "a short prompt": ([side(P, queue=0.1, prefill=0.01), side(D, prefill=0.01)], (None, "b", "direct")),
    "a short prompt, and a free one that computes it": ([side(P, prefill=0.01), side(D, prefill=0.012, move=0.012)],
                                                        ("a", "b", "pair")),
    "a short prompt where what is cached is at the decode side": ([side(P), side(D, prefill=0.005)],
                                                                  (None, "b", "direct")),
    "not so short: those that are decoded would wait": ([side(P, queue=0.2, prefill=0.04), side(D, prefill=0.04)],
                                                        ("a", "b", "pair")),
    "short, but many would wait": ([side(P, queue=0.1, prefill=0.01), side(D, prefill=0.01, running=30)],
                                   ("a", "b", "pair")),
    "short, and nobody is there to wait": ([side(P, prefill=0.02), side(D, prefill=0.02, running=0)],
                                           (None, "b", "direct")),
    "relief": ([side(P, queue=2.0), side(D, step=0.02), side(D, step=0.03)], (None, "b", "relief")),
    "no relief from those that are busy themselves": ([side(P, queue=2.0), side(D, step=0.03), side(D, step=0.03)],
                                                      ("a", "b", "no_slo")),
    "no relief from the last one": ([side(P, queue=2.0), side(D)], ("a", "b", "no_slo")),
    "too slow, all of them": ([side(P), side(D, step=0.07), side(D, step=0.06)], ("a", "c", "no_slo")),
    "no decode instance": ([side(P, queue=0.1), side(P)], (None, "b", "no_decode")),
    "decode instances are full": ([side(P), side(D, full=True)], (None, "a", "no_decode")),
    "decode instances have no memory": ([side(P), side(D, free=10)], (None, "a", "no_decode")),
    "decode instances are silent": ([side(P), side(D, stale=True)], (None, "a", "no_decode")),
    "no prefill instance": ([side(D, prefill=0.3), side(D)], (None, "b", "no_prefill")),
    "prefill instances are full": ([side(P, full=True), side(D)], (None, "b", "no_prefill")),
    "mixed ones compute whole calls": ([side(MIX), side(MIX, queue=0.1)], (None, "a", "whole")),
    "a mixed one takes over": ([side(P), side(MIX, queue=0.5)], ("a", "b", "pair")),
    "a mixed one hands over": ([side(MIX, step=0.045), side(D, move=0.001, step=0.01)], ("a", "b", "pair")),
    "a default one beside": ([side(P, queue=0.5), side(D), side(ANY)], (None, "c", "whole")),
    "a default one takes nothing over": ([side(P), side(ANY, queue=0.5)], (None, "a", "no_decode")),
    "all are full": ([side(P, full=True), side(D, full=True)], ("a", "b", "full")),
    "all are silent": ([side(P, stale=True), side(D, stale=True)], ("a", "b", "stale")),
    "nobody has memory": ([side(P, free=0), side(D, free=0)], ("a", "b", "no_memory")),
    "fewest open of equal ones": ([side(P, num_open=2), side(P), side(D), side(D, num_open=1)], ("b", "c", "pair")),
}


@pytest.mark.parametrize("case", CASES)
def test_the_pair_of_a_call(case: str) -> None:
    sides, expected = CASES[case]
    decision = choose_pair(view(sides), call_of())
    assert (decision.prefill, decision.decode, decision.reason) == expected


def test_equal_ones_take_turns_on_either_side() -> None:
    sides = [side(P), side(P), side(D), side(D), side(D)]
    chosen = [choose_pair(view(sides, number), call_of(2 + number)) for number in range(3)]
    assert [(one.prefill, one.decode) for one in chosen] == [("a", "c"), ("b", "d"), ("a", "e")]
    assert choose_pair(view(sides), call_of(2, last="e")).decode == "e", "the session was there"
    assert choose_pair(view(sides), call_of(2, last="a")).decode == "c", "and not where it does not belong"


SIDES = st.lists(st.builds(
    side, role=st.sampled_from(ROLES), queue=st.sampled_from([0.0, 0.1, 2.0]),
    prefill=st.sampled_from([0.01, 0.2, 2.0]), move=st.sampled_from([0.001, 0.1, 5.0]),
    step=st.sampled_from([0.01, 0.03, 0.1]), running=st.integers(0, 2), num_open=st.integers(0, 3),
    free=st.sampled_from([0, 10**6]), full=st.booleans(), stale=st.booleans()), min_size=1, max_size=7)


@given(sides=SIDES, turn=st.integers(0, 9))
@settings(max_examples=200)
def test_what_holds_of_every_pair(sides: list[Side], turn: int) -> None:
    snapshot, call = view(sides, turn), call_of(turn)
    decision = choose_pair(snapshot, call)
    assert decision == choose_pair(view(sides, turn), call), "it follows from its arguments"
    assert decision.decode is not None, "whoever there is computes it"
    chosen = {ord(name) - ord("a") for name in (decision.prefill, decision.decode) if name is not None}
    for number in chosen:
        assert not sides[number]["full"] or all(one["full"] for one in sides)
    if decision.prefill is not None:
        assert decision.prefill != decision.decode
        assert sides[ord(decision.prefill) - ord("a")]["role"] in HANDS_OVER
        assert sides[ord(decision.decode) - ord("a")]["role"] in TAKES_OVER
    assert decision.first in decision.scores


@given(sides=SIDES, data=st.data())
@settings(max_examples=100)
def test_less_to_do_is_never_a_reason_not_to_be_chosen(sides: list[Side], data: st.DataObject) -> None:
    decision = choose_pair(view(sides), call_of())
    assert decision.first is not None
    number = ord(decision.first) - ord("a")
    better = {**sides[number], "queue": 0.0, "num_open": 0}
    again = choose_pair(view([*sides[:number], better, *sides[number + 1:]]), call_of())
    assert again.first == decision.first


# --- of a fleet

def pairs_of(**roles: str) -> Fleet:
    fleet = Fleet(index=GlobalIndex(5000))
    for name, role in roles.items():
        fleet.join(name, role=role, block_size=BLOCK, max_waiting=100, max_open=100, num_blocks=500,
                   kv_token_bytes=1000)
    return fleet


def decided(fleet: Fleet, num_tokens: int = 400, **options: Any) -> PairDecision:
    return fleet.decide_pair([NO_MARKS], num_tokens, 1, 0.0, **options)


def test_without_roles_the_policy_decides() -> None:
    fleet = fleet_of("a", "b")
    one = fleet_of("a", "b").decide([NO_MARKS], 10, 1, 0.0)
    pair = fleet.decide_pair([NO_MARKS], 10, 1, 0.0)
    assert (pair.prefill, pair.decode, pair.first, pair.reason) == (None, one.name, one.name, one.reason)
    assert not fleet.has_pairs and pairs_of(a="DEFAULT", b="MIX").has_pairs


def test_a_fleet_chooses_pairs_in_turn_and_leaves_out_who_is_excluded() -> None:
    fleet = pairs_of(p="PREFILL", q="PREFILL", d="DECODE", e="DECODE")
    chosen = [decided(fleet) for _ in range(4)]
    assert [(one.prefill, one.decode) for one in chosen] == [("p", "d"), ("q", "e")] * 2
    assert decided(fleet, exclude={"p", "d"}) == replace(decided(fleet, exclude={"p", "d"}), prefill="q", decode="e")
    assert (decided(fleet, exclude={"d", "e"}).reason, decided(fleet, exclude={"p", "q"}).reason) == (
        "no_decode", "no_prefill")
    assert decided(fleet, exclude={"p", "q", "d", "e"}) == PairDecision(None, None, "nobody")


def test_what_is_sent_and_expected_counts_at_once() -> None:
    fleet = pairs_of(p="PREFILL", q="PREFILL", d="DECODE", e="DECODE")
    fleet.sent("p", "1", 400, NO_MARKS)
    fleet.expect("d", "1", 400)
    for _ in range(2):  # told twice: counted once
        again = decided(fleet)
        assert (again.prefill, again.decode) == ("q", "e")
        assert again.scores["p"] == pytest.approx(again.scores["q"] + 0.02 + 400 / 2000)
        fleet.sent("p", "1", 400, NO_MARKS)
        fleet.expect("d", "1", 400)
    fleet.begun("p", "1", 0.2)
    fleet.left("p", "1")
    fleet.sent("d", "1", 3, NO_MARKS)  # it goes on there
    fleet.expect("d", "1", 400)  # late
    fleet.begun("d", "1")
    assert [decided(fleet).decode for _ in range(2)] == ["e", "e"]
    fleet.left("d", "1")
    fleet.left("d", "1")
    assert {decided(fleet).decode for _ in range(2)} == {"d", "e"}


def test_an_instance_that_is_turned_gets_new_work_of_its_new_role() -> None:
    fleet = pairs_of(p="PREFILL", q="PREFILL", d="DECODE")
    fleet.turn("q", "DECODE")
    fleet.turn("nobody", "DECODE")
    assert [(one.prefill, one.decode) for one in (decided(fleet), decided(fleet))] == [("p", "q"), ("p", "d")]
    with pytest.raises(ValueError, match="q: there is no role 'BOTH'; roles are DEFAULT, PREFILL, DECODE, MIX"):
        fleet.turn("q", "BOTH")


def test_a_prompt_that_the_decode_side_has_stays_there_and_what_it_has_of_one_need_not_travel() -> None:
    fleet, prompt = pairs_of(p="PREFILL", d="DECODE", e="DECODE"), tokens(96)
    fleet.changed("e", 0, joined(prompt), b"")
    stays = fleet.decide_pair([marked(prompt)], 384, 1, 0.0)
    assert (stays.prefill, stays.decode, stays.reason, stays.matched_tokens) == (None, "e", "direct", (384,))
    for name in "de":  # they decode, and would be held up
        fleet.heard(name, report(num_running=4, num_free_blocks=400, steps=((0.0, 0.045, 4, 4),) * 8), 0.0)
        fleet.moved(name, 10**5, 1.0)  # over a link that is slow
    longer = prompt + tokens(100, seed=1)
    pair = fleet.decide_pair([marked(longer)], len(longer), 1, 0.0)
    assert (pair.prefill, pair.decode, pair.matched_tokens, pair.decode_tokens) == ("p", "e", (0,), (384,))
