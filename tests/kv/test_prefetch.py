"""`Prefetcher` on a clock of its own, over a real `TieredStore`: what it learns, when it fetches, and how much."""

import random

import pytest

from tests.kv.desk import Desk, later, open_disk, talk
from tests.kv.store_world import History
from tests.scheduler.tiered import TieredSimulation
from xllm.kv import failpoints, prefetch
from xllm.kv.moves import LOAD, READ
from xllm.kv.prefetch import MAX_RETRIES, MAX_SHARE, MIN_ACCURACY, RETRY_S, Prefetcher
from xllm.kv.prefix_index import NO_BLOCK
from xllm.request import Request, SamplingParams
from xllm.sequence import SequenceState


def two_turns(desk: Desk, gap_s: float, session: str | None, number: int = 1) -> History:
    """A conversation whose user took `gap_s` for the second turn; the device is empty afterwards."""
    first = talk(number)
    desk.turn(first, session)
    desk.now += gap_s
    second = later(first)
    desk.turn(second, session)
    desk.forget_device()
    return second


@pytest.mark.parametrize("session", ["s", None], ids=["by-session", "by-chain"])
def test_what_has_left_the_device_comes_back_a_quarter_into_the_expected_gap(session):
    desk = Desk()
    history = two_turns(desk, 40.0, session)
    desk.advance_to(desk.now + 9.9)
    assert len(desk.moves) == 0
    assert desk.prefetcher.next_s(desk.now) == pytest.approx(0.1)
    desk.advance_to(desk.now + 0.2)
    assert desk.moves.stats[LOAD].queued == 1
    desk.settle()
    assert desk.tiers.loader.num_loaded == 8
    desk.now += 20
    assert desk.turn(later(history), session) == 16
    assert (desk.prefetcher.num_right, desk.prefetcher.num_wrong) == (8, 0)
    assert desk.prefetcher._unused_blocks == 0


def test_the_gap_is_the_mean_of_the_conversations_own():
    desk = Desk()
    history = two_turns(desk, 40.0, "s")
    desk.now += 80.0
    desk.turn(later(history), "s")
    desk.advance_to(desk.now)
    assert desk.prefetcher.next_s(desk.now) == pytest.approx(0.25 * 60.0)


def test_a_conversation_without_a_past_borrows_the_median_of_all():
    desk = Desk(num_blocks=200, num_host_slots=200)
    for number, gap_s in enumerate((4.0, 8.0, 100.0)):
        two_turns(desk, gap_s, f"s{number}", number)
    desk.prefetcher._due.clear()
    desk.turn(talk(50), "new")
    assert desk.prefetcher.next_s(desk.now) == pytest.approx(0.25 * 8.0)


def test_nothing_is_expected_before_anybody_has_come_back():
    desk = Desk()
    desk.turn(talk(1), "s")
    desk.forget_device()
    assert desk.prefetcher.next_s(desk.now) is None
    desk.advance_to(1e6)
    assert desk.num_fetched() == 0


def test_what_is_still_on_the_device_is_not_fetched():
    desk = Desk()
    first = talk(1)
    desk.turn(first, "s")
    desk.now = 10.0
    desk.turn(later(first), "s")
    desk.advance_to(desk.now + 5)
    assert len(desk.moves) == 0 and desk.num_fetched() == 0


def test_only_the_part_that_has_left_comes_back():
    desk = Desk()
    history = two_turns(desk, 40.0, "s")
    desk.turn(history.prefix(6), "other", ends_well=False)
    assert len(desk.kv._index) == 3
    desk.advance_to(desk.now + 10)
    desk.settle()
    assert desk.tiers.loader.num_loaded == 5
    assert desk.turn(later(history), "s") == 16


@pytest.fixture
def disk(tmp_path):
    store = open_disk(tmp_path)
    yield store
    failpoints.disarm()
    store.abandon()


def test_from_disk_it_comes_by_way_of_host_memory(disk):
    desk = Desk(disk=disk)
    history = two_turns(desk, 40.0, "s")
    desk.forget_host()
    desk.advance_to(desk.now + 10.1)
    assert desk.moves.stats[READ].queued == 1 and desk.num_fetched() == 0
    desk.advance_to(desk.now + RETRY_S / 2)
    assert desk.moves.stats[LOAD].queued == 0, "too early"
    desk.settle()
    assert len(desk.tiers.host) == 8
    desk.advance_to(desk.now + RETRY_S)
    assert desk.moves.stats[LOAD].queued == 1
    desk.settle()
    assert desk.turn(later(history), "s") == 16
    assert desk.prefetcher.num_right == 8


def test_a_disk_that_fails_is_asked_once(disk):
    desk = Desk(disk=disk)
    two_turns(desk, 40.0, "s")
    desk.forget_host()
    failpoints.arm("disk.read", "EIO")
    desk.now += 10.1
    for _ in range(10):
        desk.advance_to(desk.now + RETRY_S * 1.01)
        desk.settle()
    assert disk.counters.num_errors == 1
    assert desk.prefetcher.next_s(desk.now) is None
    assert len(desk.tiers.host) == len(desk.tiers.disk) == desk.num_fetched() == 0


def test_what_does_not_come_from_disk_is_not_asked_for_for_ever(disk):
    desk = Desk(disk=disk)
    two_turns(desk, 40.0, "s")
    desk.forget_host()
    desk.advance_to(desk.now + 10.1)
    for _ in range(MAX_RETRIES):
        assert desk.prefetcher.next_s(desk.now) is not None
        desk.advance_to(desk.now + RETRY_S * 1.01)
    assert desk.prefetcher.next_s(desk.now) is None
    assert desk.moves.stats[READ].queued == 1
    desk.settle()


def test_unused_blocks_are_bounded_and_the_rest_is_refused():
    desk = Desk(num_blocks=128, num_host_slots=200)
    for number in range(6):
        two_turns(desk, 40.0, f"s{number}", number)
        desk.now -= 40.0
    bound = int(MAX_SHARE * 128)
    assert desk.prefetcher.max_unused_blocks == bound == 16
    desk.advance_to(desk.now + 1000)
    assert desk.num_fetched() == desk.prefetcher._unused_blocks == 16, "two conversations of eight blocks"
    assert desk.prefetcher.num_refused == 4


def test_wrong_ones_are_counted_and_shrink_the_bound():
    desk = Desk(num_blocks=128)
    history = two_turns(desk, 40.0, "s")
    desk.advance_to(desk.now + 10)
    desk.settle()
    assert desk.prefetcher._unused_blocks == 8
    desk.advance_to(desk.now + 4 * 40.0 - 0.1)
    assert desk.prefetcher.num_wrong == 0, "it is still fresh"
    desk.advance_to(desk.now + 0.2)
    assert (desk.prefetcher.num_right, desk.prefetcher.num_wrong, desk.prefetcher._unused_blocks) == (0, 8, 0)
    assert desk.prefetcher.max_unused_blocks == int(MAX_SHARE * 0.95 * 128) == 15
    desk.turn(later(history), "s")
    assert desk.prefetcher.num_right == 0, "it came too late to count"


def test_the_bound_keeps_a_chance_to_learn_better():
    desk = Desk(num_blocks=256)
    desk.prefetcher._accuracy = 0.0
    assert desk.prefetcher.max_unused_blocks == int(MAX_SHARE * MIN_ACCURACY * 256) == 1


def test_another_prompt_in_the_same_session_makes_the_prefetch_wrong():
    desk = Desk()
    two_turns(desk, 40.0, "s")
    desk.advance_to(desk.now + 10)
    desk.settle()
    desk.turn(talk(99), "s")
    assert (desk.prefetcher.num_right, desk.prefetcher.num_wrong) == (0, 8)


def test_an_aborted_turn_teaches_its_gap_and_leaves_nothing_behind():
    desk = Desk()
    history = two_turns(desk, 40.0, "s")
    desk.advance_to(desk.now + 10)
    desk.settle()
    desk.turn(later(history), "s", ends_well=False)
    assert desk.prefetcher.num_right == 8 and desk.prefetcher._unused_blocks == 0
    conversation = desk.prefetcher._by_session["s"]
    assert conversation.gap_s == pytest.approx(25.0)
    assert list(desk.prefetcher._by_tail.values()) == [conversation]


def test_the_oldest_conversations_are_forgotten(monkeypatch):
    monkeypatch.setattr(prefetch, "MAX_CONVERSATIONS", 3)
    desk = Desk(num_blocks=200, num_host_slots=200)
    for number in range(5):
        two_turns(desk, 40.0, f"s{number}", number)
    assert set(desk.prefetcher._by_session) == {"s2", "s3", "s4"}
    assert len(desk.prefetcher._by_tail) == 3
    desk.advance_to(desk.now + 1000)
    assert desk.num_fetched() <= 3 * 8


def test_two_sessions_that_end_in_the_same_words_do_not_leak():
    """One prefetch serves both; neither its blocks nor a session stays counted for ever."""
    desk = Desk()
    history = two_turns(desk, 40.0, "a")
    desk.turn(talk(7), "b")
    desk.advance_to(desk.now + 10)
    desk.settle()
    assert desk.prefetcher._unused_blocks == 8
    desk.turn(history, "b")
    assert set(desk.prefetcher._by_session) == {"b"}
    assert len(desk.prefetcher._by_tail) == 1
    assert desk.prefetcher._unused_blocks == 0


def test_a_full_device_is_not_emptied_of_what_others_hold():
    desk = Desk(num_blocks=20, num_host_slots=64)
    two_turns(desk, 40.0, "s")
    desk.kv._held_paths[0] = desk.kv.pool.allocate(13)
    desk.prefetcher._fetcher = Generous(desk.tiers)
    desk.advance_to(desk.now + 10)
    assert desk.num_fetched() == 0 and len(desk.moves) == 0
    desk.kv.let_go(0)
    desk.advance_to(desk.now)


class Generous:
    """The tiers, asked for as much as there is."""

    num_device_blocks = 10_000

    def __init__(self, tiers):
        self._tiers = tiers

    def fetch(self, tail, max_blocks):
        return self._tiers.fetch(tail, 10_000)


# --- tenants


def request_of(salt: str, session: str | None, name: str = "r") -> Request:
    return Request(request_id=name, prompt_token_ids=list(range(20)), cache_salt=salt, session_id=session,
                   sampling=SamplingParams(max_tokens=2, seed=1), eos_token_ids=())  # fmt: skip


def test_session_keys_tell_tenants_apart():
    keys = {SequenceState(request_of(salt, session), 0).session_key
            for salt, session in [("", "s"), ("a", "s"), ("b", "s"), ("a:s", "s"), ("a", "s:s"), ("a", "t")]}
    assert len(keys) == 6
    assert SequenceState(request_of("a", None), 0).session_key is None


def test_two_tenants_may_use_the_same_session_id():
    simulation = TieredSimulation(random.Random(0), num_host_slots=40, num_blocks=40, host_blocks_factor=1.0)
    prefetcher = simulation.tiers.prefetcher = Prefetcher(simulation.tiers)
    for number, salt in enumerate(("a", "b", "a", "b")):
        request = request_of(salt, "same", f"r{number}")
        simulation.requests[request.request_id] = request
        simulation.outputs[request.request_id] = []
        simulation.scheduler.add(request)
        simulation.run()
    assert len(prefetcher._by_session) == 2
    tails = [conversation.tail for conversation in prefetcher._by_session.values()]
    assert len(set(tails)) == 2 and all(simulation.tiers._index.find(tail) != NO_BLOCK for tail in tails)
    simulation.check_idle()
