"""Requests whose KV goes to another engine: tokens as of one engine, no block used too early, nothing left behind."""

import random

import pytest

from tests.scheduler.harness import VOCAB
from tests.scheduler.linked import LinkedSimulation, Pair
from tests.scheduler.test_tiers import random_settings
from xllm.request import FinishReason


def make_pair(rng: random.Random, *, fault_rate: float) -> Pair:
    engines = []
    settings = random_settings(rng) | {"max_model_len": 96}
    for _ in range(2):
        settings |= {name: value for name, value in random_settings(rng).items()
                     if name in ("async_scheduling", "num_speculative_tokens", "max_num_seqs", "preemption_mode")}
        settings["block_size"] = rng.choice([2, 4])
        num_blocks = -(-96 // settings["block_size"]) + rng.choice([0, 1, 5, 30])
        engines.append(LinkedSimulation(rng, fault_rate=fault_rate, num_blocks=num_blocks,
                                        num_host_slots=rng.choice([7, 30, 200]),
                                        eagerness=rng.choice([0.2, 0.7, 0.95]), **settings))
    return Pair(rng, *engines)


def play(pair: Pair, rng: random.Random, num_requests: int) -> None:
    heads = [[rng.randrange(VOCAB) for _ in range(rng.randrange(1, 60))] for _ in range(3)]
    added = 0
    for _ in range(20_000):
        if added == num_requests and not pair.has_work:
            return
        if added < num_requests and rng.random() < 0.3:
            prompt = rng.choice(heads) + [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 20))]
            pair.add(f"r{added}", prompt, max_tokens=rng.choice([1, 2, 9, 14]))
            added += 1
        if pair.requests and rng.random() < 0.02:
            name = rng.choice(list(pair.requests))
            pair.prefill.scheduler.abort(name)
            pair.decode.scheduler.abort(name)
        if (landings := list(pair.decode.lander._open)) and rng.random() < 0.02:
            pair.decode.lander.revoke(rng.choice(landings))
        pair.step()
    raise AssertionError("it never ends")


@pytest.mark.parametrize("fault_rate", [0.0, 0.3])
@pytest.mark.parametrize("seed", range(12))
def test_requests_go_on_at_another_engine_whatever_lands(seed, fault_rate):
    rng = random.Random(seed)
    pair = make_pair(rng, fault_rate=fault_rate)
    play(pair, rng, num_requests=14)
    pair.check()


def test_many_are_handed_over_though_some_ways_break():
    num_handed = num_faults = 0
    for seed in range(100, 104):
        rng = random.Random(seed)
        pair = make_pair(rng, fault_rate=0.1)
        play(pair, rng, num_requests=20)
        pair.check()
        num_handed += pair.num_handed
        num_faults += pair.prefill.links.num_faults
    assert num_handed > 10 and num_faults > 2, (num_handed, num_faults)


def test_what_was_sent_is_not_computed_again():
    rng = random.Random(5)
    settings = {"max_model_len": 96, "block_size": 4, "host_blocks_factor": 1.0, "num_blocks": 60,
                "num_host_slots": 60, "eagerness": 1.0}
    pair = Pair(rng, LinkedSimulation(rng, fault_rate=0.0, **settings),
                LinkedSimulation(rng, fault_rate=0.0, **settings))
    prompt = [rng.randrange(1, VOCAB) for _ in range(41)]
    pair.add("a", prompt, max_tokens=12, ignore_eos=True)
    while pair.has_work:
        pair.step()
    pair.check()
    assert pair.prefill.finished["a"].finish_reason is FinishReason.HANDED_OVER
    assert pair.decode.lander.num_landed == 10
    (cached,) = {delta.num_cached_tokens for delta in [pair.decode.finished["a"]]}
    assert cached == 40
    assert pair.decode.finished["a"].cached_by_tier in (None, {"l1": 0, "l2": 0, "l3": 40, "l4": 0})


def test_blocks_that_the_receiver_has_do_not_travel():
    rng = random.Random(6)
    settings = {"max_model_len": 96, "block_size": 4, "host_blocks_factor": 1.0, "num_blocks": 60,
                "num_host_slots": 60, "eagerness": 1.0}
    pair = Pair(rng, LinkedSimulation(rng, fault_rate=0.0, **settings),
                LinkedSimulation(rng, fault_rate=0.0, **settings))
    prompt = [rng.randrange(1, VOCAB) for _ in range(41)]
    for name, tail in (("a", 0), ("b", 1)):
        pair.add(name, prompt[:24] + [tail] * 17, max_tokens=4, ignore_eos=True)
        while pair.has_work:
            pair.step()
    pair.check()
    assert pair.num_handed == 2
    assert pair.decode.lander.num_landed == 10 + 4
