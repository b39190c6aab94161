"""What a router knows of a fleet, and where it sends calls."""

from __future__ import annotations

import random
from array import array

import numpy as np
import pytest

from xllm.kv.block import block_digests
from xllm.routing.fleet import Fleet
from xllm.routing.global_index import GlobalIndex
from xllm.routing.policies import POLICIES
from xllm.routing.prompt_marks import NO_MARKS, PromptMarks, prompt_marks
from xllm.routing.routed_instance import STALE_S, LoadReport

BLOCK = 4


def tokens(num_blocks: int, seed: int = 0) -> array[int]:
    rng = random.Random(seed)
    return array("i", [rng.randrange(100) for _ in range(num_blocks * BLOCK)])


def joined(token_ids: array[int]) -> bytes:
    return b"".join(block_digests(np.asarray(token_ids), BLOCK))


def marked(token_ids: array[int]) -> PromptMarks:
    return prompt_marks(token_ids, BLOCK)


def fleet_of(*names: str, policy: str = "cache_aware", seed: int = 0, max_waiting: int = 100,
             max_open: int = 100) -> Fleet:
    fleet = Fleet(policy, index=GlobalIndex(5000), seed=seed)
    for name in names:
        fleet.join(name, block_size=BLOCK, max_waiting=max_waiting, max_open=max_open, num_blocks=500)
    return fleet


def report(num_waiting: int = 0, num_running: int = 0, num_free_blocks: int = 500,
           steps: tuple[tuple[float, float, int, int], ...] = ()) -> LoadReport:
    return LoadReport(num_waiting=num_waiting, num_running=num_running, num_free_blocks=num_free_blocks, steps=steps)


def test_a_call_goes_to_where_its_prompt_is_cached_in_any_tier() -> None:
    fleet, prompt = fleet_of("a", "b", "c"), tokens(50)
    fleet.changed("b", 1, joined(prompt), b"")
    decision = fleet.decide([marked(prompt)], 200, 1, 0.0)
    assert (decision.name, decision.reason, decision.matched_tokens) == ("b", "prefix", (200,))
    assert decision.scores["b"] < decision.scores["a"] == decision.scores["c"]
    fleet.changed("c", 0, joined(prompt), b"")
    assert fleet.decide([marked(prompt)], 200, 1, 0.0).name == "c", "nothing is to be loaded there"
    fleet.changed("c", 0, b"", joined(prompt)[16 * 20:])
    assert fleet.decide([marked(prompt)], 200, 1, 0.0).name == "b"
    assert fleet.decide([marked(prompt)], 200, 1, 0.0, exclude={"b"}).name == "c"
    fleet.leave("b")
    assert fleet.decide([marked(prompt)], 200, 1, 0.0).name == "c"
    fleet.changed("b", 0, joined(prompt), b"")  # it comes late, and is nobody's


def test_who_joins_again_has_nothing() -> None:
    fleet, prompt = fleet_of("a", "b"), tokens(50)
    fleet.changed("a", 0, joined(prompt), b"")
    fleet.sent("a", "1", 0, NO_MARKS)
    fleet.join("a", block_size=BLOCK, max_waiting=1, max_open=1, num_blocks=500)
    assert fleet.names == ("b", "a")
    decision = fleet.decide([marked(prompt)], 200, 1, 0.0)
    assert decision.reason == "turn" and decision.scores["a"] == decision.scores["b"]
    fleet.left("a", "1")  # of its last life
    fleet.left("nobody", "1")


def test_a_burst_with_one_prefix_stays_together() -> None:
    fleet, prompt = fleet_of("a", "b", "c"), tokens(896)
    chosen = []
    for number in range(5):
        full = prompt + tokens(2, seed=number + 1)
        decision = fleet.decide([marked(full)], len(full), 1, 0.0)
        assert decision.name is not None
        fleet.sent(decision.name, str(number), len(full) - decision.matched_tokens[0], marked(full))
        chosen.append(decision.name)
    assert len(set(chosen)) == 1 and decision.matched_tokens == (896 * BLOCK,)
    fleet.begun(chosen[0], "0")
    assert fleet.decide([marked(prompt)], 3584, 1, 0.0).matched_tokens == (3584,), "others promise it still"


@pytest.mark.parametrize("policy", POLICIES)
def test_no_one_to_go_to(policy: str) -> None:
    fleet = fleet_of(policy=policy)
    assert fleet.decide([NO_MARKS], 5, 1, 0.0).name is None and fleet.block_size is None
    fleet = fleet_of("a", policy=policy)
    decision = fleet.decide([NO_MARKS], 5, 1, 0.0, exclude=["a", "b"])
    assert (decision.name, decision.reason, decision.scores) == (None, "nobody", {})


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("max_waiting", "max_open"), [(2, 100), (100, 2)])
def test_full_ones_are_passed_by(policy: str, max_waiting: int, max_open: int) -> None:
    fleet = fleet_of("a", "b", "c", policy=policy, max_waiting=max_waiting, max_open=max_open)
    fleet.changed("a", 0, joined(tokens(50)), b"")
    for name in ("a", "b"):
        fleet.sent(name, "1", 0, NO_MARKS)
        fleet.sent(name, "2", 0, NO_MARKS)
    for number in range(2):
        decision = fleet.decide([marked(tokens(50))], 200, 1, 0.0)
        assert decision.name == "c" and decision.reason != "full"
        fleet.sent("c", str(number), 0, NO_MARKS)
    assert fleet.decide([NO_MARKS], 5, 1, 0.0).reason == "full"
    fleet.left("b", "2")
    assert fleet.decide([NO_MARKS], 5, 1, 0.0).name == "b"
    assert fleet.decide([NO_MARKS], 5, 2, 0.0).reason == "full"


def test_what_others_have_there_counts() -> None:
    fleet = fleet_of("a", "b", max_open=10)
    fleet.sent("a", "1", 4, NO_MARKS)
    fleet.heard("a", report(num_running=1), 0.0)
    fleet.heard("b", report(num_running=8), 0.0)
    assert fleet.decide([NO_MARKS], 5, 1, 0.0).name == "b", "they may have ended meanwhile"
    fleet.heard("b", report(num_waiting=2, num_running=8), 0.0)
    assert fleet.decide([NO_MARKS], 5, 1, 0.0).name == "a"
    fleet.heard("b", report(), 0.1)
    assert fleet.decide([NO_MARKS], 5, 1, 0.1).name == "b"


def test_stale_ones_are_passed_by_and_among_stale_ones_two_are_drawn() -> None:
    fleet, prompt = fleet_of("a", "b", "c", "d"), tokens(50)
    fleet.changed("a", 0, joined(prompt), b"")
    for name in "abcd":
        fleet.heard(name, report(), 0.0)
    assert fleet.decide([marked(prompt)], 200, 1, STALE_S).name == "a"
    for name in "bcd":
        fleet.heard(name, report(), 1.0)
    assert fleet.decide([marked(prompt)], 200, 1, STALE_S + 0.5).name in "bcd"
    fleet.heard("a", report(), STALE_S + 1.0)
    fleet.behind("a", True)
    decision = fleet.decide([marked(prompt)], 200, 1, STALE_S + 2.0)
    assert decision.reason == "stale"
    for number in range(9):
        fleet.sent("d", str(number), 0, NO_MARKS)
    drawn = [fleet.decide([NO_MARKS], 5, 1, 9.0).name for _ in range(200)]
    assert set(drawn) == set("abc"), "the busiest loses against any"
    fleet.behind("a", False)
    fleet.heard("a", report(), 9.0)
    assert fleet.decide([NO_MARKS], 5, 1, 9.0).name == "a"


def test_a_session_stays_where_all_are_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xllm.routing.fleet.MAX_SESSIONS", 20)
    fleet = fleet_of("a", "b", "c")
    last = fleet.decide([NO_MARKS], 5, 1, 0.0, session="one").name
    assert {fleet.decide([NO_MARKS], 5, 1, 0.0).name for _ in range(3)} == set("abc")
    decision = fleet.decide([NO_MARKS], 5, 1, 0.0, session="one")
    assert (decision.name, decision.reason) == (last, "session")
    for number in range(20):
        fleet.decide([NO_MARKS], 5, 1, 0.0, session=str(number))
    assert len(fleet._sessions) == 20 and "one" not in fleet._sessions, "the oldest is forgotten"


def test_equal_ones_take_turns_whoever_comes_and_goes() -> None:
    fleet = fleet_of("a", "b", "c")
    assert [fleet.decide([NO_MARKS], 5, 1, 0.0).name for _ in range(4)] == ["a", "b", "c", "a"]
    fleet.leave("b")
    assert [fleet.decide([NO_MARKS], 5, 1, 0.0).name for _ in range(3)] == ["c", "a", "c"]
    fleet.join("d", block_size=BLOCK, max_waiting=1, max_open=1, num_blocks=500)
    assert [fleet.decide([NO_MARKS], 5, 1, 0.0).name for _ in range(3)] == ["d", "a", "c"]


def test_what_is_reported_of_steps_decides_by_targets() -> None:
    fleet = fleet_of("a", "b", "c", policy="slo_aware")
    assert fleet.decide([NO_MARKS], 100, 1, 0.0).scores == dict.fromkeys("abc", 0.05), "as is assumed"
    for name, token_s in (("a", 0.01), ("b", 0.002)):
        mixed = ((0.0, 0.01 + 200 * token_s, 201, 1), (0.0, 0.01, 1, 1)) * 20
        fleet.heard(name, report(steps=mixed), 0.0)
    decision = fleet.decide([NO_MARKS], 100, 1, 0.0)
    assert decision.scores["a"] == pytest.approx(1.0, rel=0.1) and decision.scores["b"] == pytest.approx(0.2, rel=0.1)
    assert decision.scores["b"] < decision.scores["c"] < decision.scores["a"], "as the others on average"
    fleet.heard("b", report(steps=((0.0, 0.2, 1, 1), (0.0, 0.6, 201, 1)) * 400), 0.0)
    assert fleet.decide([NO_MARKS], 10, 1, 0.0).name != "b", "its tokens are slow"
    assert fleet.decide([NO_MARKS], 100, 1, 0.0, deadline_s=0.01).reason == "no_slo"


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown routing policy 'best'; known are cache_aware"):
        Fleet("best")
    with pytest.raises(ValueError, match="there is no role 'ENCODE'"):
        fleet_of().join("a", role="ENCODE", block_size=4, max_waiting=1, max_open=1, num_blocks=1)
