"""Random workloads under random settings: every output right, every block accounted for, after each step."""

import functools
import random

import pytest

from tests.scheduler.harness import VOCAB, Simulation
from xllm.config import EVICTION_POLICIES, POLICIES


def random_settings(rng: random.Random) -> dict:
    chunked = rng.random() < 0.7
    settings = {
        "async_scheduling": rng.random() < 0.6,
        "enable_prefix_caching": rng.random() < 0.7,
        "num_speculative_tokens": rng.choice([0, 0, 1, 3]),
        "enable_chunked_prefill": chunked,
        "scheduling_policy": rng.choice(POLICIES),
        "max_num_seqs": rng.choice([1, 2, 4, 7]),
        "block_size": rng.choice([1, 2, 4, 5]),
        "max_num_batched_tokens": rng.choice([4, 8, 17, 40]) if chunked else 96,
        "max_model_len": rng.choice([24, 40, 96]),
        "watermark": rng.choice([0.0, 0.1]),
        "eviction_policy": rng.choice(EVICTION_POLICIES),
        "l1_share": rng.choice([0.0, 0.0, 0.3]),
    }
    if chunked and rng.random() < 0.3:
        settings["long_prefill_token_threshold"] = 3
    return settings


def run_workload(seed: int) -> Simulation:
    """Requests with shared prefixes arrive, some are aborted; the pool holds little more than one of them."""
    rng = random.Random(seed)
    settings = random_settings(rng)
    length = settings["max_model_len"]
    simulation = Simulation(-(-length // settings["block_size"]) + rng.choice([0, 1, 5, 30]), **settings)
    bases = [[rng.randrange(VOCAB) for _ in range(length)] for _ in range(3)]
    num_requests = rng.randrange(1, 25)
    while len(simulation.requests) < num_requests or simulation.loop.has_work():
        if len(simulation.requests) < num_requests and rng.random() < 0.4:
            prompt = rng.choice(bases)[: rng.randrange(1, length - 1)]
            if rng.random() < 0.5:
                prompt = [*prompt[:-1], rng.randrange(VOCAB)]
            simulation.add(f"r{len(simulation.requests)}", prompt, eos=rng.random() < 0.5,
                           max_tokens=rng.choice([1, 2, 5, 30, None]), offline=rng.random() < 0.3,
                           priority=rng.randrange(3), deadline_s=rng.choice([None, 1.0, 2.0]))
        if simulation.requests and rng.random() < 0.05:
            simulation.scheduler.abort(rng.choice(list(simulation.requests)))
        simulation.step()
    assert len(simulation.finished) == num_requests
    return simulation


@functools.cache
def check_workload(seed: int) -> dict[str, int]:
    """Returns how often what came about in it."""
    try:
        simulation = run_workload(seed)
        simulation.check_outputs()
        simulation.check_idle()
    except Exception as error:
        raise AssertionError(f"workload {seed}") from error
    counters = simulation.scheduler.counters
    return {"preempted": counters.preemptions_total, "prefix_hits": counters.prefix_hits_total,
            "drafts_accepted": counters.spec_accepted_tokens_total,
            "aborted": counters.requests_finished_total["abort"], "evicted": simulation.scheduler.kv.pool.num_evicted}


@pytest.mark.parametrize("start", range(0, 200, 25))
def test_random_workloads(start):
    for seed in range(start, start + 25):
        check_workload(seed)


def test_the_workloads_reach_what_they_are_meant_to_reach():
    """Otherwise the test above proves little."""
    found = [check_workload(seed) for seed in range(60)]
    totals = {what: sum(counts[what] for counts in found) for what in found[0]}
    assert all(totals.values()), totals
