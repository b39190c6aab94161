"""What few workloads reach: rows that fail, a stop among accepted drafts, requests that only come and go."""

import dataclasses
import math
import random

import numpy as np
import pytest

from tests.scheduler.harness import VOCAB, Simulation, expected
from tests.scheduler.memory_runner import MemoryRunner
from tests.scheduler.test_random import random_settings
from xllm.errors import RequestError
from xllm.request import FinishReason, Request, SamplingParams
from xllm.step import ScheduleOutput, StepOutput

BROKEN = "broken"


class FailingRunner(MemoryRunner):
    """Fails each sampling row with some probability, and goes on as `ModelRunner` does: it reports the
    tokens before the place that failed but takes in all that it drew."""

    def __init__(self, simulation: Simulation, chance: float, seed: int = 0):
        config = simulation.config
        super().__init__(config.scheduler.max_num_seqs, simulation.scheduler.kv.num_blocks,
                         config.cache.block_size, VOCAB)
        self.chance, self.rng = chance, random.Random(seed)
        simulation.loop.steps.runner = self

    def run(self, plan: ScheduleOutput) -> StepOutput:
        result = super().run(plan)
        failed = [i for i in np.flatnonzero(result.num_sampled_S).tolist() if self.rng.random() < self.chance]
        for i in failed:
            result.num_sampled_S[i] = self.rng.randrange(result.num_sampled_S[i])
            result.token_ids_SR[i, result.num_sampled_S[i]:] = -1
        return dataclasses.replace(result, failed=dict.fromkeys(failed, BROKEN))


@pytest.mark.parametrize("start", range(0, 60, 20))
def test_failed_rows_end_alone_whatever_else_happens(start):
    """Failures beside overlap, drafts, preemption and aborts."""
    for seed in range(start, start + 20):
        rng = random.Random(seed)
        settings = random_settings(rng)
        length = settings["max_model_len"]
        simulation = Simulation(-(-length // settings["block_size"]) + rng.choice([0, 1, 5]), **settings)
        FailingRunner(simulation, 0.03, seed)
        base = [rng.randrange(VOCAB) for _ in range(length)]
        while len(simulation.requests) < 20 or simulation.loop.has_work():
            if len(simulation.requests) < 20 and rng.random() < 0.4:
                simulation.add(f"r{len(simulation.requests)}", base[: rng.randrange(1, length - 1)],
                               eos=rng.random() < 0.5, offline=rng.random() < 0.3, max_tokens=rng.choice([2, 9, None]))
            if simulation.requests and rng.random() < 0.05:
                simulation.scheduler.abort(rng.choice(list(simulation.requests)))
            simulation.step()
        simulation.check_outputs()
        simulation.check_idle()
        assert len(simulation.finished) == 20
        reasons = [delta.finish_reason for delta in simulation.finished.values()]
        finished = simulation.scheduler.counters.requests_finished_total
        assert finished == {r.value: reasons.count(r) for r in FinishReason}
        assert all((d.error == BROKEN) == (d.finish_reason is FinishReason.ERROR) for d in simulation.finished.values())


@pytest.mark.parametrize("overlap", [False, True])
def test_nobody_finds_the_blocks_of_a_failed_step(overlap):
    simulation = Simulation(async_scheduling=overlap)
    runner = FailingRunner(simulation, 1.0)
    prompt = [(3 * i) % VOCAB for i in range(18)]
    simulation.add("bad", prompt)
    simulation.run()
    assert simulation.finished["bad"].finish_reason is FinishReason.ERROR
    runner.chance = 0.0
    simulation.add("good", prompt)
    simulation.run()
    simulation.check_outputs()
    assert simulation.finished["good"].num_cached_tokens == 0


@pytest.mark.parametrize("num_prompt", range(4, 12))
def test_a_stop_among_accepted_drafts_offers_no_block_beyond_it(num_prompt):
    """The KV behind the stop belongs to tokens that were never returned; the row's memory says zeros stand there."""
    for num_output in range(1, 8):
        simulation = Simulation(block_size=4, num_speculative_tokens=3, async_scheduling=False)
        prompt = list(range(1, num_prompt + 1))
        params = SamplingParams(max_tokens=8, seed=0)
        tokens, _ = expected(Request(request_id="", prompt_token_ids=prompt, sampling=params), simulation.config)
        simulation.add("writer", prompt, stop_token_ids=[tokens[num_output - 1]])
        simulation.run()
        known = prompt + simulation.outputs["writer"]
        simulation.add("reader", known + [0] * 8)
        simulation.run()  # MemoryRunner compares what the reader reads
        simulation.check_outputs()
        assert simulation.finished["reader"].num_cached_tokens <= len(known)


def test_requests_that_come_and_go_in_the_queue_leave_nothing_behind():
    simulation = Simulation(max_num_seqs=1, max_model_len=96)
    simulation.add("running", [1, 2, 3], max_tokens=None)
    simulation.step()
    simulation.add("head", [1, 2, 3])
    for i in range(1000):
        simulation.add(f"gone{i}", [1, 2, 3])
        simulation.scheduler.abort(f"gone{i}")
    assert len(simulation.scheduler.waiting) == 1
    assert len(simulation.scheduler.waiting._heap) < 100
    simulation.run()
    assert simulation.finished["head"].finish_reason is FinishReason.LENGTH
    simulation.check_idle()


def test_the_stop_table_is_as_wide_as_its_widest_row():
    simulation = Simulation(max_num_seqs=3)
    simulation.add("some", [1, 2], stop_token_ids=[100, 101, 102], max_tokens=30)
    simulation.add("many", [1, 2], stop_token_ids=range(100, 300), max_tokens=3)
    simulation.add("one", [1, 2], eos=True, max_tokens=40)
    widths = []
    while simulation.loop.has_work():
        simulation.step()
        widths.append(simulation.scheduler.rows.stop_ids_RE.shape[1])
    simulation.check_outputs()
    assert widths[0] == 200
    assert set(widths) == {200, 3, 1}


def test_a_deadline_that_is_no_number_is_refused():
    simulation = Simulation(scheduling_policy="deadline")
    with pytest.raises(RequestError, match="deadline_s"):
        simulation.add("r", [1, 2], deadline_s=math.nan)
    assert not simulation.loop.has_work()
