"""Where a call goes: what must hold of every choice of every policy, and choices that a person can check."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xllm.routing.fleet_snapshot import Decision, FleetSnapshot, RoutedCall
from xllm.routing.policies import ALIASES, POLICIES, cache_aware, load_aware, policy_of, slo_aware
from xllm.routing.policies.cache_aware import BOUND, OPEN_REQUEST_TOKENS, SURPLUS_WEIGHT, WORK_WEIGHT
from xllm.routing.policies.load_aware import FULL_QUEUE_REQUESTS

AMPLE, NUM_TOKENS = 10**6, 1000
Place = dict[str, Any]


def place(matched: float = 0, waiting: int = 0, num_open: int = 0, free: int = AMPLE, full: bool = False,
          stale: bool = False, queued: int = 0, spent: float = 0.0, speed: float = 1000.0,
          tpot_s: float = 0.01) -> Place:
    return locals()


def snapshot_of(places: list[Place], names: str = "abcdefgh") -> FleetSnapshot:
    def column(name: str) -> np.ndarray:
        return np.array([one[name] for one in places], dtype=bool if name in ("full", "stale") else np.float64)

    return FleetSnapshot(
        names=tuple(names[: len(places)]), saved_tokens=column("matched"), device_tokens=column("matched"),
        waiting_tokens=column("waiting"), num_open=column("num_open"), num_queued=column("queued"),
        num_tokens=np.full(len(places), float(AMPLE)), free_tokens=column("free"), spent_tokens=column("spent"),
        is_full=column("full"), is_stale=column("stale"), prefill_tokens_per_s=column("speed"),
        next_token_s=column("tpot_s"))


def call_of(turn: int = 0, last: str | None = None, draws: tuple[float, float] = (0.0, 0.0), ttft_s: float = 1.0,
            num_tokens: int = NUM_TOKENS) -> RoutedCall:
    return RoutedCall(num_tokens=num_tokens, last=last, turn=turn, draws=draws, ttft_s=ttft_s, tpot_s=0.05)


def decide(policy: str, places: list[Place], call: RoutedCall | None = None, names: str = "abcdefgh") -> Decision:
    return POLICIES[policy](snapshot_of(places, names), call_of() if call is None else call)


PLACES = st.lists(st.builds(
    place, matched=st.integers(0, NUM_TOKENS), waiting=st.integers(0, 3000), num_open=st.integers(0, 40),
    free=st.integers(0, 2000), full=st.booleans(), stale=st.booleans(), queued=st.integers(0, 20),
    spent=st.integers(0, 100_000), speed=st.sampled_from([500.0, 1000.0, 4000.0]),
    tpot_s=st.sampled_from([0.01, 0.1])), min_size=1, max_size=6)
CALLS = st.builds(call_of, turn=st.integers(0, 7), last=st.sampled_from([None, "a", "b", "z"]),
                  draws=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)))
EVERY = pytest.mark.parametrize("policy", POLICIES)


# --- of all policies

@EVERY
@given(places=PLACES, call=CALLS)
@settings(max_examples=40)
def test_what_holds_of_every_choice(policy: str, places: list[Place], call: RoutedCall) -> None:
    decision = decide(policy, places, call)
    assert decision == decide(policy, places, call), "it follows from its arguments"
    assert decision.name in decision.scores and list(decision.scores) == list("abcdef"[: len(places)])
    chosen = places[ord(decision.name) - ord("a")]
    assert not chosen["full"] or (all(one["full"] for one in places) and decision.reason == "full")
    able = [one for one in places if not one["full"]] or places
    if policy in ("round_robin", "random"):
        return
    assert not chosen["stale"] or chosen["full"] or all(one["stale"] for one in able)
    assert (decision.reason == "stale") == (chosen["stale"] and not chosen["full"])
    fresh = [one for one in able if not one["stale"]]
    if not chosen["full"] and any(NUM_TOKENS - one["matched"] <= one["free"] for one in fresh):
        assert NUM_TOKENS - chosen["matched"] <= chosen["free"], "it has KV memory for the call"
        assert decision.reason != "no_memory"


@EVERY
@given(places=PLACES, call=CALLS, data=st.data())
@settings(max_examples=40)
def test_who_is_chosen_is_chosen_with_more_of_the_prompt_and_less_to_do(policy: str, places: list[Place],
                                                                        call: RoutedCall, data: st.DataObject) -> None:
    name = decide(policy, places, call).name
    assert name is not None
    number = ord(name) - ord("a")
    old = places[number]
    more = {**old, "matched": data.draw(st.integers(old["matched"], NUM_TOKENS))}
    less = {**more, **{what: data.draw(st.integers(0, old[what])) for what in ("waiting", "num_open", "queued")}}
    for better in (more, less):
        assert decide(policy, [*places[:number], better, *places[number + 1:]], call).name == name


@pytest.mark.parametrize("policy", ["cache_aware", "load_aware"])
@given(places=PLACES, data=st.data())
@settings(max_examples=40)
def test_the_order_of_the_instances_does_not_matter(policy: str, places: list[Place], data: st.DataObject) -> None:
    """But among those that are equal, and for what is drawn."""
    order = data.draw(st.permutations(range(len(places))))
    first = decide(policy, places)
    other = decide(policy, [places[number] for number in order], names="".join("abcdef"[number] for number in order))
    assert other.scores == pytest.approx(first.scores)
    if "stale" not in (first.reason, other.reason):
        assert first.name is not None and other.name is not None
        assert first.scores[other.name] == pytest.approx(first.scores[first.name])


@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy != "random"])
def test_equal_ones_take_turns(policy: str) -> None:
    same = [place(matched=7)] * 3
    assert [decide(policy, same, call_of(turn)).name for turn in range(7)] == list("abcabca")
    assert decide(policy, [place(full=True), *same], call_of(0)).name == "b"


@pytest.mark.parametrize("policy", ["cache_aware", "load_aware", "slo_aware"])
def test_equal_ones_are_told_apart_by_the_session_then_by_what_is_open(policy: str) -> None:
    same = [place(), place(), place()]
    assert (decide(policy, same, call_of(1, last="a")).name, decide(policy, same, call_of(1, last="z")).name) == ("a",
                                                                                                              "b")
    assert decide(policy, [place(free=10), place(), place()], call_of(1, last="a")).name != "a", "not able"
    if policy != "cache_aware":  # there open requests cost something
        busy = [place(num_open=2), place(num_open=2), place(num_open=1)]
        assert decide(policy, busy).name == "c"
        assert decide(policy, busy, call_of(last="a")).name == "a"


@pytest.mark.parametrize("policy", ["cache_aware", "load_aware", "slo_aware"])
def test_of_stale_ones_two_are_drawn(policy: str) -> None:
    places = [place(stale=True, num_open=number, matched=NUM_TOKENS - number) for number in range(4)]
    chosen = {decide(policy, places, call_of(draws=(x / 8, y / 8))).name for x in range(8) for y in range(8)}
    assert chosen == set("abc"), "the busiest of all never"
    assert decide(policy, [place(stale=True)], call_of(draws=(0.9, 0.9))).name == "a"
    assert decide(policy, [*places, place(waiting=5000)]).name == "e"


def test_any_one_is_drawn_that_is_not_full() -> None:
    places = [place(matched=NUM_TOKENS), place(full=True), place(stale=True), place(waiting=5000, free=0)]
    drawn = [decide("random", places, call_of(draws=(number / 9, 0.5))) for number in range(9)]
    assert [one.name for one in drawn] == list("aaacccddd") and {one.reason for one in drawn} == {"drawn"}
    last = decide("random", [place(full=True)] * 2, call_of(draws=(0.999, 0.0)))
    assert (last.name, last.reason) == ("b", "full")


@pytest.mark.parametrize("policy", ["cache_aware", "load_aware", "slo_aware"])
def test_nobody_starves(policy: str) -> None:
    """One has all of every prompt; as it gets them, it becomes worse, until others have their turn."""
    places = [place(matched=NUM_TOKENS), place(), place()]
    got = [0, 0, 0]
    for turn in range(300):
        name = decide(policy, places, call_of(turn)).name
        assert name is not None
        number = ord(name) - ord("a")
        got[number] += 1
        old = places[number]
        places[number] = {**old, "waiting": old["waiting"] + NUM_TOKENS - old["matched"] + 200, "free": AMPLE,
                          "num_open": old["num_open"] + 1, "queued": old["queued"] + 1}
    assert min(got) > 30 and got[0] == max(got)


def test_names() -> None:
    assert {policy_of(name) for name in ALIASES} < set(POLICIES.values())
    assert policy_of("CAR") is cache_aware.decide and policy_of("load_aware") is load_aware.decide


# --- of one each

@pytest.mark.parametrize(("places", "chosen"), [
    ([place(), place(matched=500)], "b"),
    ([place(matched=500), place(matched=600)], "b"),
    ([place(), place(matched=500, waiting=624)], "b"),
    ([place(), place(matched=500, waiting=626)], "a"),
    ([place(num_open=1), place(matched=500, num_open=10)], "b"),
    ([place(), place(matched=500, num_open=10)], "a"),
    ([place(num_open=3), place(num_open=2)], "b"),
    ([place(waiting=OPEN_REQUEST_TOKENS), place(num_open=1)], "a"),
    ([place(), place(matched=500, free=499)], "a"),
    ([place(waiting=9000), place(matched=500, free=500)], "b"),
    ([place(waiting=9000), place(matched=900, full=True)], "a"),
    ([place(free=10), place(full=True)], "a"),
    ([place(full=True), place(full=True, matched=20)], "b"),
    ([place(), place(matched=500, spent=6000)], "b"),
    ([place(), place(matched=500, spent=100_000)], "a"),
    ([place(spent=90_000), place(matched=500, spent=100_000)], "b"),
], ids=["cached", "longer", "its queue is shorter", "its queue is longer", "few run there", "many run there",
        "fewer run", "waiting or running", "no memory", "memory enough", "full", "full is worse", "all full",
        "a little more was computed", "much more was computed", "both have computed much"])
def test_choices_of_cache_aware(places: list[Place], chosen: str) -> None:
    assert decide("cache_aware", places).name == chosen


@given(PLACES, CALLS)
@settings(max_examples=100)
def test_the_longest_prefix_wins_unless_it_costs_more_than_it_saves(places: list[Place], call: RoutedCall) -> None:
    able = [one for one in places if not one["full"] and not one["stale"]
            and NUM_TOKENS - one["matched"] <= one["free"]]
    if not able:
        return
    mean = sum(one["spent"] for one in places) / len(places)

    def load(one: Place) -> float:
        return float(one["waiting"] + OPEN_REQUEST_TOKENS * one["num_open"]
                     + SURPLUS_WEIGHT * max(0.0, one["spent"] - BOUND * mean))

    name = decide("cache_aware", places, call).name
    assert name is not None
    chosen, longest = places[ord(name) - ord("a")], max(able, key=lambda one: one["matched"])
    saved = longest["matched"] - chosen["matched"]
    assert chosen in able and (saved <= 0 or load(longest) - load(chosen) >= WORK_WEIGHT * saved - 1e-6)


@pytest.mark.parametrize(("places", "chosen"), [
    ([place(free=500_000), place(free=600_000)], "b"),
    ([place(free=500_000), place(free=600_000, queued=FULL_QUEUE_REQUESTS)], "a"),
    ([place(free=500_000, matched=500), place(free=500_000)], "a"),
    ([place(), place(free=500)], "a"),
], ids=["room", "a queue", "what is cached needs no room", "no room"])
def test_choices_of_load_aware(places: list[Place], chosen: str) -> None:
    assert decide("load_aware", places).name == chosen


@pytest.mark.parametrize(("places", "chosen", "reason"), [
    ([place(matched=100), place(matched=500), place(matched=400)], "b", "slo"),
    ([place(matched=500, waiting=600), place(matched=100)], "b", "slo"),
    ([place(matched=500, tpot_s=0.06), place(matched=100)], "b", "slo"),
    ([place(matched=500, tpot_s=0.06), place(waiting=900)], "a", "no_slo"),
    ([place(waiting=9000, matched=900), place(waiting=3000)], "b", "no_slo"),
    ([place(waiting=9000), place(waiting=20_000, speed=8000.0)], "b", "no_slo"),
    ([place(matched=500, full=True), place()], "b", "slo"),
], ids=["most of the prompt", "its first token is late", "its tokens are slow", "none keeps both",
        "none is soon enough", "it is fast", "it is full"])
def test_choices_of_slo_aware(places: list[Place], chosen: str, reason: str) -> None:
    decision = decide("slo_aware", places)
    assert (decision.name, decision.reason) == (chosen, reason)
    assert decision.scores == dict(zip("abc", slo_aware.first_token_s(snapshot_of(places), call_of()).tolist()))


def test_an_earlier_deadline_is_a_target() -> None:
    places = [place(matched=600, waiting=200), place(matched=500)]
    assert decide("slo_aware", places).name == "a"
    assert decide("slo_aware", places, call_of(ttft_s=0.55)).name == "b"
    assert decide("slo_aware", places, replace(call_of(), ttft_s=-1.0)).reason == "no_slo"
