"""KV on its way from one engine's worker to another's: when it is sent, what is refused, and what breaks on the way."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from xllm.config import EngineConfig
from xllm.engine.core import EngineCore
from xllm.errors import TransferError
from xllm.kv.tickets import Ticket
from xllm.kv_offer import NOTHING_MISSING, KVOffer
from xllm.request import FinishReason, OutputDelta, Request, SamplingParams
from xllm.transfer.transports import connect
from xllm.worker.landing_desk import LandingDesk

SETTINGS = {"enable_disagg_pd": True, "host_blocks_factor": 1.0, "num_kv_blocks": 128, "max_num_batched_tokens": 64,
            "block_size": 16, "num_threads": 1, "max_model_len": 512}
PROMPT = [(7 * place) % 900 + 3 for place in range(200)]
LAYER_S = 0.03  # that a layer is made to take: far longer than its few kilobytes travel


def core_of(**settings) -> EngineCore:
    return EngineCore(EngineConfig.from_flat(**{**SETTINGS, **settings}))


@pytest.fixture
def pair() -> Iterator[tuple[EngineCore, EngineCore]]:
    made = core_of(), core_of()
    yield made
    for core in made:
        core.shutdown()


def make_request(**fields) -> Request:
    sampling = SamplingParams(temperature=0, max_tokens=fields.pop("max_tokens", 40), ignore_eos=True)
    return Request(request_id="a", prompt_token_ids=PROMPT, sampling=sampling, **fields)


def run(core: EngineCore) -> list[OutputDelta]:
    found = []
    while core.has_work():
        found += core.step()
    return found


def tokens(deltas: list[OutputDelta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


@functools.cache
def expected() -> list[int]:
    core = core_of(enable_disagg_pd=False)
    found = tokens(run_one(core, make_request()))
    core.shutdown()
    return found


def run_one(core: EngineCore, request: Request) -> list[OutputDelta]:
    core.add(request)
    return run(core)


def offer_of(core: EngineCore, request: Request, lease_s: float = 30.0) -> KVOffer:
    offer = core.expect(request, lease_s)
    assert isinstance(offer, KVOffer), offer
    return offer


def landed(core: EngineCore, offer: KVOffer) -> None:
    while core.scheduler.promotions.lander.is_landing(offer.number, 0.0):
        core.tick()
        time.sleep(0.001)


def check_idle(core: EngineCore) -> None:
    """Nothing is held, on the device or in host memory, once all moves and leases have ended."""
    while len(core.scheduler.kv.source.moves) or len(core.scheduler.promotions.lander):
        core.tick()
        time.sleep(0.001)
    core.scheduler.check_integrity()
    assert core.scheduler.kv.num_free_blocks == core.scheduler.kv.num_usable_blocks
    assert not core.scheduler.promotions.lander._store.host.num_held
    assert not len(core.scheduler.departures)


def test_layers_travel_while_the_next_one_is_computed(pair, monkeypatch):
    """A copy behind the prefill would have no layer there by the end of its chunk."""
    sender, receiver = pair
    num_layers = len(sender.link.worker.runner.kv_cache.layers)
    lock, arrived, at_the_end = threading.Lock(), [], []
    count, finish = LandingDesk._count, Ticket.finish

    def note(desk, landing, text):
        with lock:
            arrived.append(landing.move.number)
        count(desk, landing, text)

    def slowly(layers, ticket):
        for caches in layers:
            yield caches
            time.sleep(LAYER_S)
            ticket.advance()
        time.sleep(0)

    def end(ticket):
        time.sleep(LAYER_S)  # the last layer's
        with lock:
            at_the_end.append(len(arrived))
        finish(ticket)

    monkeypatch.setattr(LandingDesk, "_count", note)
    monkeypatch.setattr(Ticket, "finish", end)
    monkeypatch.setattr("xllm.runner.model_runner.published", slowly)
    offer = offer_of(receiver, make_request())
    deltas = run_one(sender, make_request(offer=offer))
    assert deltas[-1].finish_reason is FinishReason.HANDED_OVER
    landed(receiver, offer)
    chunks = -(-(len(PROMPT) // 16 * 16) // SETTINGS["max_num_batched_tokens"])  # that fill a block
    assert len(arrived) == num_layers * chunks and len(at_the_end) == chunks
    for chunk, number in enumerate(at_the_end):
        assert number >= chunk * num_layers + num_layers - 1, at_the_end


def test_tokens_and_what_is_left(pair):
    sender, receiver = pair
    offer = offer_of(receiver, make_request())
    first = run_one(sender, make_request(offer=offer))
    rest = run_one(receiver, make_request(generated_token_ids=tuple(tokens(first)), landing=offer.number))
    assert tokens(first) + tokens(rest) == expected()
    assert rest[0].cached_by_tier == {"l1": 0, "l2": 0, "l3": 192, "l4": 0, "l5": 0}
    assert receiver.expect(make_request(), 1.0) == NOTHING_MISSING
    for core in pair:
        check_idle(core)


@pytest.mark.parametrize("broken_put", range(0, 12, 3))
def test_a_way_that_breaks(pair, monkeypatch, broken_put):
    """Behind any put: the request stays, and what has landed by then is a prefix."""
    from xllm.transfer import way

    sender, receiver = pair
    puts = iter(range(100))
    put = way.Way._put

    def break_off(self, offer, placed, note):
        if next(puts) == broken_put:
            raise TransferError("it broke")
        put(self, offer, placed, note)

    monkeypatch.setattr(way.Way, "_put", break_off)
    offer = offer_of(receiver, make_request(), lease_s=2.0)
    deltas = run_one(sender, make_request(offer=offer))
    assert deltas[-1].finish_reason is FinishReason.LENGTH and tokens(deltas) == expected()
    landed(receiver, offer)
    assert tokens(run_one(receiver, make_request())) == expected()
    for core in pair:
        check_idle(core)


def test_a_receiver_that_is_gone(pair):
    sender, receiver = pair
    offer = offer_of(receiver, make_request())
    receiver.shutdown()
    deltas = run_one(sender, make_request(offer=offer))
    assert deltas[-1].finish_reason is FinishReason.LENGTH and tokens(deltas) == expected()


def test_a_sender_that_never_comes(pair):
    """The lease ends the landing, and the request that waited for it is computed."""
    _, receiver = pair
    offer = offer_of(receiver, make_request(), lease_s=0.5)
    assert tokens(run_one(receiver, make_request(landing=offer.number))) == expected()
    assert not len(receiver.scheduler.promotions.lander)
    check_idle(receiver)


def test_an_abort_of_what_waits_for_its_kv(pair):
    _, receiver = pair
    offer = offer_of(receiver, make_request(), lease_s=600.0)
    receiver.add(make_request(landing=offer.number))
    receiver.step()
    receiver.abort("a")
    assert [delta.finish_reason for delta in run(receiver)] == [FinishReason.ABORT]
    check_idle(receiver)


def test_kv_that_is_not_wanted_any_more(pair, caplog):
    """Its room is free at once, long before the lease is over, and whoever sends it then is refused."""
    sender, receiver = pair
    host = receiver.scheduler.promotions.lander._store.host
    before = host.num_available
    offer = offer_of(receiver, make_request(), lease_s=600.0)
    assert host.num_available < before
    for _ in range(2):  # what is over is ignored, and what never was
        receiver.unexpect(offer.number)
        receiver.unexpect(99)
        check_idle(receiver)
    assert host.num_available == before
    deltas = run_one(sender, make_request(offer=offer))
    assert deltas[-1].finish_reason is FinishReason.LENGTH and tokens(deltas) == expected()
    assert any("it was revoked" in record.getMessage() for record in caplog.records)
    assert host.num_available == before and not len(host), "nothing was written"
    for core in pair:
        check_idle(core)


def test_kv_that_is_not_wanted_while_it_comes(pair, monkeypatch):
    """What has come whole stays cached; the rest is free."""
    from xllm.transfer import way

    sender, receiver = pair
    puts, put = iter(range(100)), way.Way._put

    def revoke_between(self, offer, placed, note):
        if next(puts) == 8:
            receiver.unexpect(offer.number)
        put(self, offer, placed, note)

    monkeypatch.setattr(way.Way, "_put", revoke_between)
    host = receiver.scheduler.promotions.lander._store.host
    before = host.num_available
    deltas = run_one(sender, make_request(offer=offer_of(receiver, make_request(), lease_s=600.0)))
    assert deltas[-1].finish_reason is FinishReason.LENGTH and tokens(deltas) == expected()
    for core in pair:
        check_idle(core)
    assert host.num_available == before
    assert tokens(run_one(receiver, make_request())) == expected()


def test_an_abort_of_one_of_two_that_wait_for_the_same_kv(pair):
    sender, receiver = pair
    offer = offer_of(receiver, make_request(), lease_s=600.0)
    first, second = make_request(landing=offer.number), make_request(landing=offer.number).varied(request_id="b")
    receiver.add(first)
    receiver.add(second)
    receiver.step()
    receiver.abort("a")
    run_one(sender, make_request(offer=offer))
    rest = run(receiver)
    assert rest[0].finish_reason is FinishReason.ABORT
    assert tokens(rest) == expected() and {delta.num_cached_tokens for delta in rest[1:]} == {192}
    for core in pair:
        check_idle(core)


def test_room_that_there_is_not(pair):
    _, receiver = pair
    small = core_of(host_blocks_factor=0.05)
    try:
        assert small.expect(make_request(), 1.0) == "there is no room for 12 KV blocks"
    finally:
        small.shutdown()
    plain = core_of(enable_disagg_pd=False)
    try:
        assert "runs without enable_disagg_pd" in plain.expect(make_request(), 1.0)
        offer = offer_of(receiver, make_request(), lease_s=0.2)
        with pytest.raises(ValueError, match="sends no KV"):
            plain.add(replace(make_request(), offer=offer))
    finally:
        plain.shutdown()


@pytest.mark.parametrize(("mine", "theirs", "why"), [
    ({"block_size": 24}, {}, "KV blocks of 24 tokens here and 16 there do not divide"),
    ({"kv_cache_dtype": "int8"}, {}, "a KV cache of int8 is sent as that, and fp32 is wanted")])
def test_what_does_not_fit_together(mine, theirs, why, caplog):
    sender, receiver = core_of(**mine), core_of(**theirs)
    try:
        deltas = run_one(sender, make_request(offer=offer_of(receiver, make_request(), lease_s=0.5)))
        assert deltas[-1].finish_reason is FinishReason.LENGTH
        assert any(why in record.getMessage() for record in caplog.records)
    finally:
        sender.shutdown()
        receiver.shutdown()


@pytest.mark.parametrize(("mine", "theirs"), [
    ({}, {"block_size": 32}), ({"block_size": 32}, {}), ({"block_size": 64}, {"kv_store_dtype": "bf16"}),
    ({"kv_transfer_ways": "tcp"}, {"kv_transfer_ways": "tcp"})])
def test_layouts_and_ways_that_differ(mine, theirs):
    sender, receiver = core_of(**mine), core_of(**theirs)
    try:
        offer = offer_of(receiver, make_request())
        first = run_one(sender, make_request(offer=offer))
        rest = run_one(receiver, make_request(generated_token_ids=tuple(tokens(first)), landing=offer.number))
        assert receiver.scheduler.promotions.lander.num_landed >= len(PROMPT) // 64 * 64 // 32
        if "kv_store_dtype" not in theirs:
            assert tokens(first) + tokens(rest) == expected()
        assert len(tokens(first) + tokens(rest)) == 40
    finally:
        sender.shutdown()
        receiver.shutdown()


def test_a_window_that_is_gone_is_tried_once_for_all_that_waits_for_it(monkeypatch):
    """A peer waits 10 s for one over TCP: blocks of many requests would be held for minutes."""
    tries = []

    def count(addresses, **given):
        tries.append(addresses)
        return connect(addresses, **given)

    monkeypatch.setattr("xllm.transfer.way.connect", count)
    sender, receiver = core_of(), core_of(kv_transfer_ways="shm")
    offers = [offer_of(receiver, make_request())] * 3
    receiver.shutdown()
    for number, offer in enumerate(offers):
        sender.add(replace(make_request(offer=offer), request_id=str(number)))
    assert [delta.finish_reason for delta in run(sender) if delta.finish_reason] == [FinishReason.LENGTH] * 3
    check_idle(sender)
    assert len(tries) == 1
    sender.shutdown()


def test_no_thread_is_kept_for_instances_that_have_started_again(monkeypatch):
    monkeypatch.setattr("xllm.worker.publisher.IDLE_S", 0.0)
    sender, threads = core_of(), []
    for _ in range(4):
        receiver = core_of()
        offer = offer_of(receiver, make_request())
        assert run_one(sender, make_request(offer=offer))[-1].finish_reason is FinishReason.HANDED_OVER
        check_idle(sender)
        receiver.shutdown()
        threads += [one for one in threading.enumerate() if one.name == "xllm-kv-publish" and one not in threads]
    threads[-2].join(10)
    assert len(threads) == 4 and [one.is_alive() for one in threads] == [False, False, False, True]
    sender.shutdown()
