"""Steps that are started before the host knows the tokens of the step before give what steps one by one give."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tests.runner.harness import Driver
from tests.runner.tiny_model import PROMPT
from xllm.request import SamplingParams
from xllm.runner.model_runner import QueuedStep
from xllm.runner.row_state import RowState
from xllm.runner.sampler import NOT_FINITE
from xllm.step import ScheduleOutput, StepOutput

MakeDriver = Callable[..., Driver]
NO_SUCH_TOKEN = 10**6
PLAIN = [SamplingParams(temperature=t, top_k=k, max_tokens=None) for t, k in ((0.0, 0), (0.8, 0), (0.9, 20), (0.0, 0))]


@pytest.fixture(autouse=True)
def unread_tokens_are_no_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands in the rows before a token has arrived is no token: whoever computes with it fails."""
    honest = RowState.advance_unread

    def advance(rows: RowState, rows_S: np.ndarray, num_S: np.ndarray, rows_Q: np.ndarray, places: np.ndarray) -> None:
        rows.token_ids[rows_Q, rows.num_tokens[rows_Q]] = NO_SUCH_TOKEN
        honest(rows, rows_S, num_S, rows_Q, places)

    monkeypatch.setattr(RowState, "advance_unread", advance)


class Ahead:
    """Starts each step before the one before it is finished, as an overlapped engine does."""

    def __init__(self, driver: Driver):
        self.runner, self.outputs = driver.runner, []
        self._open: list[StepOutput | QueuedStep] = []
        self.num_queued = 0
        driver.runner = self

    @property
    def rows(self) -> RowState:
        return self.runner.rows

    def run(self, plan: ScheduleOutput) -> StepOutput:
        """A stand-in for the driver, which has no use for the tokens: they come later."""
        self._open.append(self.runner.start(plan))
        self.num_queued += isinstance(self._open[-1], QueuedStep)
        self.finish(1)
        return StepOutput(step=plan.step, num_sampled_S=plan.samples_S.astype(np.int32),
                          token_ids_SR=np.where(plan.samples_S, NO_SUCH_TOKEN, -1)[:, None].astype(np.int32),
                          num_drafts_S=plan.max_drafts_S)

    def finish(self, left: int) -> None:
        while len(self._open) > left:
            step = self._open.pop(0)
            self.outputs.append(step if isinstance(step, StepOutput) else step.finish())


def scenario(driver: Driver, sampling: list[SamplingParams]) -> None:
    """Prefills in chunks beside decoding rows, groups that grow and shrink, a row that leaves."""
    for i, params in enumerate(sampling[:3]):
        driver.add(f"s{i}", PROMPT[i : i + 9], params, seed=i)
    driver.step({"s0": 0, "s1": 4})
    driver.step({"s0": 0, "s1": 0, "s2": 3})
    for _ in range(4):
        driver.step({"s0": 0, "s1": 0})
    driver.step({"s0": 0, "s1": 0, "s2": 0})
    driver.step({"s2": 0})
    driver.add("s3", PROMPT[5:20], sampling[3])
    for _ in range(5):
        driver.step()
    driver.step({"s0": 0})


def outputs_of(driver: Driver, sampling: list[SamplingParams]) -> tuple[list[list[list[int]]], int]:
    ahead = Ahead(driver)
    scenario(driver, sampling)
    ahead.finish(0)
    return [output.token_ids_SR.tolist() for output in ahead.outputs], ahead.num_queued


def plain_outputs(driver: Driver, sampling: list[SamplingParams]) -> list[list[list[int]]]:
    outputs, run = [], driver.runner.run

    def keep(plan: ScheduleOutput) -> StepOutput:
        outputs.append(run(plan))
        return outputs[-1]

    driver.runner.run = keep
    scenario(driver, sampling)
    return [output.token_ids_SR.tolist() for output in outputs]


@pytest.mark.parametrize("settings", [{}, {"graph_max_prefill_tokens": 64}, {"graph_max_graphs": 1},
                                      {"graph_max_seqs": 1}], ids=str)
def test_started_ahead_equals_one_by_one(make_driver: MakeDriver, settings: dict) -> None:
    plain = plain_outputs(make_driver(), PLAIN)
    driver = make_driver(graph_mode="checked", **settings)
    outputs, num_queued = outputs_of(driver, PLAIN)
    assert outputs == plain
    assert num_queued == len(plain)
    feed = driver.runner.runner.feed
    assert feed.num_fed == len(plain) - 1


@pytest.mark.parametrize("extra", [{"logprobs": 1}, {"repetition_penalty": 1.3}, {"min_tokens": 4},
                                   {"prompt_logprobs": 1}], ids=str)
def test_steps_that_need_the_host_wait_for_it(make_driver: MakeDriver, extra: dict) -> None:
    sampling = [*PLAIN[:2], SamplingParams(temperature=0.7, max_tokens=None, **extra), PLAIN[3]]
    plain = plain_outputs(make_driver(), sampling)
    outputs, num_queued = outputs_of(make_driver(graph_mode="checked"), sampling)
    assert outputs == plain
    assert 0 < num_queued < len(plain)


def test_a_row_whose_logits_are_not_finite_fails_alone(make_driver: MakeDriver) -> None:
    driver = make_driver(graph_mode="checked")
    model, ahead = driver.runner._model, Ahead(driver)
    honest = model.compute_logits
    driver.add("good", PROMPT[:4])
    driver.add("bad", PROMPT[:4])
    driver.step()
    driver.step()

    def spoil(hidden_TD):
        logits = honest(hidden_TD)
        logits[1] = float("nan")
        return logits

    model.compute_logits = spoil
    driver.runner.runner.graphs.cache.clear()
    driver.step()
    model.compute_logits = honest
    driver.runner.runner.graphs.cache.clear()
    driver.step()
    ahead.finish(0)
    assert [output.failed for output in ahead.outputs] == [{}, {}, {1: NOT_FINITE}, {}]
    assert ahead.outputs[2].token_ids_SR[:, 0].tolist()[1] == -1
    assert ahead.outputs[2].num_sampled_S.tolist() == [1, 0]


def test_a_finished_step_is_read_once(make_driver: MakeDriver) -> None:
    driver = make_driver(graph_mode="checked")
    ahead = Ahead(driver)
    driver.add("a", PROMPT[:4])
    driver.step()
    step = ahead._open[0]
    assert step.finish() is step.finish()
    assert step.is_finished
