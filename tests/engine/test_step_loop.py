"""The step loop: what it says of time, and how it ends a request that fails."""

from types import SimpleNamespace

import pytest

from tests.engine.test_core import drain, make_core
from tests.scheduler.harness import Simulation
from xllm.request import FinishReason, Request, SamplingParams


@pytest.mark.parametrize("overlap", [False, True])
def test_idle_time_is_no_part_of_a_step(monkeypatch, overlap):
    now = [100.0]
    monkeypatch.setattr("xllm.engine.step_loop.time", SimpleNamespace(monotonic=lambda: now[0]))
    simulation = Simulation(async_scheduling=overlap)
    for name in ("first", "after a pause"):
        now[0] += 3600.0
        simulation.add(name, [1, 2, 3])
        while simulation.loop.has_work():
            simulation.step()
            now[0] += 2.0
            assert simulation.loop.step_time_s <= 4.0
    assert simulation.loop.num_steps


@pytest.mark.parametrize("settings", [{}, {"async_scheduling": False}], ids=["overlap", "no overlap"])
def test_a_request_that_fails_among_drafts_returns_what_came_before(settings):
    """Only token 5 is allowed, and not n times in a row: n - 1 tokens come, with drafts or without."""
    core = make_core(speculative_method="ngram", **settings)
    for n in range(4, 12):
        sampling = SamplingParams(temperature=0, max_tokens=40, logprobs=1, allowed_token_ids=(5,),
                                  bad_words_token_ids=((5,) * n,))
        core.add(Request(request_id=f"{n}", prompt_token_ids=[5, 6, 7, 8], sampling=sampling))
    outputs = drain(core)
    assert core.stats().spec_accepted_tokens_total
    core.shutdown()
    for n in range(4, 12):
        deltas = outputs[f"{n}"]
        assert [token for delta in deltas for token in delta.token_ids] == [5] * (n - 1)
        assert all(len(delta.logprobs or ()) == len(delta.token_ids) for delta in deltas)
        assert [delta.finish_reason for delta in deltas if delta.finish_reason] == [FinishReason.ERROR]
