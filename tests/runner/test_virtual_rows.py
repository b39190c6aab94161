"""Random workloads on the xtensor layout: every page right, the cap kept, every state accounted for."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest

from tests.runner.virtual_memory import VirtualSimulation
from tests.scheduler.harness import VOCAB
from tests.scheduler.test_random import random_settings
from xllm.errors import WorkerError
from xllm.kv.xtensor import XTensorCounters


def run_workload(seed: int, **fixed: Any) -> VirtualSimulation:
    """Conversations: a request is often a former prompt with its answer and more. Some are aborted."""
    rng = random.Random(seed)
    settings = random_settings(rng)
    length, block_size = settings["max_model_len"], settings["block_size"]
    layout = {"max_mappings": rng.choice([None, None, 0, 3, 8, 20, 60]), "more_ranges": rng.choice([0, 0, 3]), **fixed}
    simulation = VirtualSimulation(-(-length // block_size) + rng.choice([0, 1, 5, 30]), rng=rng, **layout, **settings)
    texts = [[rng.randrange(VOCAB) for _ in range(length)] for _ in range(3)]
    num_requests = rng.randrange(1, 25)
    while len(simulation.requests) < num_requests or simulation.loop.has_work():
        if len(simulation.requests) < num_requests and rng.random() < 0.4:
            prompt = rng.choice(texts)[: rng.randrange(1, length - 1)]
            if rng.random() < 0.5:
                prompt = [*prompt[:-1], rng.randrange(VOCAB)]
            simulation.add(f"r{len(simulation.requests)}", prompt, eos=rng.random() < 0.5,
                           max_tokens=rng.choice([1, 2, 5, 30, None]), offline=rng.random() < 0.3)
        if simulation.requests and rng.random() < 0.05:
            simulation.scheduler.abort(rng.choice(list(simulation.requests)))
        for delta in simulation.step():
            if delta.finish_reason is not None:
                prompt = list(simulation.requests[delta.request_id].prompt_token_ids)
                texts.append((prompt + simulation.outputs[delta.request_id] + texts[0])[:length])
    simulation.check_outputs()
    simulation.check_idle()
    return simulation


def check_workloads(seeds: range, **fixed: Any) -> None:
    for seed in seeds:
        try:
            run_workload(seed, **fixed)
        except Exception as error:
            raise AssertionError(f"workload {seed}") from error


@pytest.mark.parametrize("start", range(0, 60, 20))
def test_random_workloads(start: int) -> None:
    check_workloads(range(start, start + 20))


def test_the_system_refuses_mappings() -> None:
    check_workloads(range(1000, 1015), refusals=0.1)


def test_ranks_decide_the_same_however_far_each_is() -> None:
    """What a rank that is ahead could unmap already, the other could not: both wait until both can."""
    check_workloads(range(36, 50), is_shared=True, max_mappings=8)


def test_ranks_do_not_go_on_without_a_mapping_that_another_may_have() -> None:
    with pytest.raises(AssertionError, match="workload") as raised:
        check_workloads(range(1000, 1015), refusals=0.1, is_shared=True)
    assert isinstance(raised.value.__cause__, WorkerError)


def test_the_workloads_reach_what_they_are_meant_to_reach() -> None:
    """Otherwise the tests above prove little."""
    totals = {field.name: 0 for field in dataclasses.fields(XTensorCounters)}
    on_tables = mixed = refused = 0
    for seed in range(15):
        simulation = run_workload(seed)
        for name in totals:
            totals[name] += getattr(simulation.xtensor.counters, name)
        runner = simulation.runner
        on_tables += runner.num_on_tables
        mixed += 0 < runner.num_on_tables < runner.num_steps
        refused += run_workload(seed, refusals=0.2).arena.num_refused if seed < 5 else 0
    assert all(totals.values()), totals
    assert on_tables and mixed and refused


def test_the_count_of_mappings_is_the_true_one() -> None:
    for seed in range(100, 110):
        simulation = run_workload(seed)
        shown = simulation.xtensor.num_mappings
        assert simulation.arena.num_mappings() == shown


def test_without_room_for_any_mapping_all_runs_on_tables() -> None:
    simulation = run_workload(7, max_mappings=0)
    assert simulation.runner.num_on_tables == simulation.runner.num_steps
    assert simulation.xtensor.counters.pages_mapped == 0
