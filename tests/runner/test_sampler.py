"""The sampler, parameter by parameter, against float64 definitions; and what must not influence it."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from backends.backend import Backend
from tests.runner.naive_sampling import edited_logits, invert, kept_probabilities
from xllm.request import EDITED_AWAY, NO_TOKEN_LEFT, SamplingParams
from xllm.runner.logit_edits import LogitEdits, SlotEdits, TableStore, edit_logits
from xllm.runner.row_state import RowState
from xllm.runner.sampler import NOT_FINITE, Sampler
from xllm.runner.uniform import uniforms
from xllm.step import NewRow

VOCAB = 37
PROMPT = [3, 9, 9, 21, 30]
OUTPUT = [9, 4, 4, 4, 30, 12]
EOS = (2, 36, 5000)  # a generation config may name an id that the vocabulary lacks
EDITS: dict[str, dict[str, Any]] = {
    "presence": {"presence_penalty": 1.5},
    "presence-negative": {"presence_penalty": -0.7},
    "frequency": {"frequency_penalty": 0.8},
    "repetition": {"repetition_penalty": 1.7},
    "repetition-below-1": {"repetition_penalty": 0.6},
    "penalties": {"presence_penalty": 0.3, "frequency_penalty": -0.2, "repetition_penalty": 1.2},
    "bias": {"logit_bias": {0: 5.0, 4: -100.0, 36: 2.5}},
    "allowed": {"allowed_token_ids": (1, 4, 9, 36)},
    "bad-token": {"bad_words_token_ids": ((9,), (0,))},
    "bad-words": {"bad_words_token_ids": ((30, 12, 7), (12, 8), (4, 30, 13), (5, 30, 12, 6), (12, 36))},
    "bad-word-longer-than-the-output": {"bad_words_token_ids": ((*OUTPUT, 11), (30, *OUTPUT, 10))},
    "min-tokens": {"min_tokens": 7, "stop_token_ids": (5, 9)},
    "min-tokens-reached": {"min_tokens": 6, "stop_token_ids": (5, 9)},
    "min-tokens-and-bias": {"min_tokens": 7, "stop_token_ids": (5,), "logit_bias": {5: 50.0, 36: 9.0}},
    "all": {"allowed_token_ids": tuple(range(2, 30)), "bad_words_token_ids": ((12, 8), (3,)), "min_tokens": 9,
            "stop_token_ids": (5,), "logit_bias": {9: -3.0, 3: 4.0}, "repetition_penalty": 1.1,
            "frequency_penalty": 0.4, "presence_penalty": 0.2},
}
CHOICES: dict[str, dict[str, Any]] = {
    "plain": {},
    "hot": {"temperature": 3.0},
    "cold": {"temperature": 0.3},
    "greedy": {"temperature": 0.0},
    "nearly-greedy": {"temperature": 1e-300},
    "top-k": {"top_k": 5},
    "top-k-larger-than-vocabulary": {"top_k": 1000},
    "top-p": {"top_p": 0.7},
    "tiny-top-p": {"top_p": 1e-6},
    "min-p": {"min_p": 0.2},
    "all": {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
}


class Bench:
    """Rows with a prompt and an output, and a sampler over them."""

    def __init__(self, backend: Backend, params: list[SamplingParams], *, seeds: list[int] | None = None,
                 output: list[int] = OUTPUT):
        self.rows = RowState(max_num_seqs=len(params), max_model_len=64, block_size=16)
        self.sampler = Sampler(backend.ops, self.rows, VOCAB, backend.device)
        tokens = np.array(PROMPT + output, dtype=np.int32)
        for row, sampling in enumerate(params):
            new = NewRow(row=row, request_id=str(row), token_ids=tokens, num_prompt_tokens=len(PROMPT),
                         num_computed_tokens=0, block_ids=np.zeros(1, np.int32), sampling=sampling,
                         eos_token_ids=EOS, seed=seeds[row] if seeds else row)
            self.rows.enter(new)
            self.sampler.enter(new)

    def draw(self, logits_QV: torch.Tensor, rows: list[int] | None = None) -> SimpleNamespace:
        rows = list(range(len(logits_QV))) if rows is None else rows
        token_ids_Q, failed, logprobs = self.sampler.draw(
            lambda places: logits_QV[torch.from_numpy(places)], np.array(rows, dtype=np.int32),
            np.zeros(len(rows), dtype=np.int64), np.arange(len(rows)))
        return SimpleNamespace(token_ids_Q=token_ids_Q, failed=failed, logprobs=logprobs)


def random_logits(num: int, *, seed: int = 0) -> torch.Tensor:
    return torch.randn(num, VOCAB, generator=torch.Generator().manual_seed(seed)) * 2.0


def edit(backend: Backend, logits_V: torch.Tensor, sampling: SamplingParams, history: list[int]) -> None:
    edits = LogitEdits(sampling, TableStore(VOCAB, backend.device).of(sampling, EOS))
    edit_logits(backend.ops, logits_V[None], [SlotEdits(0, edits, np.array(history, dtype=np.int32), len(PROMPT))])


@pytest.mark.parametrize("name", EDITS)
def test_edits_equal_their_definition(backend: Backend, name: str) -> None:
    sampling = SamplingParams(**EDITS[name])
    logits_V = random_logits(1)[0]
    expected = edited_logits(logits_V.double().tolist(), sampling, PROMPT, OUTPUT, EOS)
    edit(backend, logits_V, sampling, PROMPT + OUTPUT)
    np.testing.assert_allclose(logits_V.numpy(), expected, rtol=1e-5, atol=1e-5)
    assert LogitEdits.needed(sampling)


@pytest.mark.parametrize("name", EDITS)
def test_edits_before_any_output(backend: Backend, name: str) -> None:
    sampling = SamplingParams(**EDITS[name])
    logits_V = random_logits(1)[0]
    expected = edited_logits(logits_V.double().tolist(), sampling, PROMPT, [], EOS)
    edit(backend, logits_V, sampling, PROMPT)
    np.testing.assert_allclose(logits_V.numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("edit", [None, "penalties", "allowed", "min-tokens", "min-tokens-reached", "all"])
@pytest.mark.parametrize("choice", CHOICES)
def test_draws_equal_their_definition(backend: Backend, choice: str, edit: str | None) -> None:
    """64 rows with different seeds; a uniform number on the border of two tokens may fall to either."""
    sampling = SamplingParams(**CHOICES[choice], **(EDITS[edit] if edit else {}))
    bench = Bench(backend, [sampling] * 64)
    logits_QV = random_logits(64, seed=1)
    drawn = bench.draw(logits_QV).token_ids_Q.tolist()
    uniform_Q = uniforms(np.arange(64, dtype=np.uint64), np.full(64, len(PROMPT + OUTPUT)))
    checked = 0
    for logits, uniform, token in zip(logits_QV.double().tolist(), uniform_Q.tolist(), drawn):
        edited = edited_logits(logits, sampling, PROMPT, OUTPUT, EOS)
        expected, margin = invert(kept_probabilities(edited, sampling), uniform)
        if margin > 1e-5:
            assert token == expected
            checked += 1
    assert checked >= 60


def test_a_mixed_batch_equals_each_row_alone(backend: Backend) -> None:
    """Every kind of row side by side, in any order."""
    params = [SamplingParams(**choice, **edit) for choice in CHOICES.values() for edit in ({}, *EDITS.values())]
    bench = Bench(backend, params)
    logits_QV = random_logits(len(params), seed=2)
    together = bench.draw(logits_QV).token_ids_Q
    order = np.random.default_rng(0).permutation(len(params))
    shuffled = bench.draw(logits_QV[torch.from_numpy(order)], order.tolist()).token_ids_Q
    alone = [bench.draw(logits_QV[q:q + 1], [q]).token_ids_Q[0] for q in range(len(params))]
    assert together.tolist() == alone
    assert shuffled.tolist() == together[order].tolist()


def test_seed_and_position_alone_decide(backend: Backend) -> None:
    flat = torch.zeros(3, VOCAB)
    draws = [Bench(backend, [SamplingParams()] * 3, seeds=[5, 5, 2**64 + 6], output=OUTPUT[:n]).draw(flat).token_ids_Q
             for n in range(6)]
    assert all(tokens[0] == tokens[1] for tokens in draws)
    assert len({int(tokens[0]) for tokens in draws}) > 3
    assert any(tokens[0] != tokens[2] for tokens in draws)
    negative = Bench(backend, [SamplingParams()], seeds=[-1]).draw(flat[:1]).token_ids_Q
    assert negative == Bench(backend, [SamplingParams()], seeds=[2**64 - 1]).draw(flat[:1]).token_ids_Q


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_one_bad_logit_fails_its_row_only(backend: Backend, bad: float, temperature: float) -> None:
    bench = Bench(backend, [SamplingParams(temperature=temperature)] * 5)
    clean = random_logits(5, seed=3)
    poisoned = clean.clone()
    poisoned[2, 11] = bad
    expected, found = bench.draw(clean).token_ids_Q, bench.draw(poisoned)
    assert found.failed == {2: NOT_FINITE}
    assert np.delete(found.token_ids_Q, 2).tolist() == np.delete(expected, 2).tolist()
    assert 0 <= found.token_ids_Q[2] < VOCAB


def test_no_token_left_fails_its_row_only(backend: Backend) -> None:
    nothing = SamplingParams(allowed_token_ids=(5,), stop_token_ids=(5,), min_tokens=10)
    bench = Bench(backend, [SamplingParams(), nothing, SamplingParams(temperature=0.0)])
    logits_QV = random_logits(3, seed=4)
    found = bench.draw(logits_QV)
    assert found.failed == {1: NO_TOKEN_LEFT}
    assert found.token_ids_Q[0] == bench.draw(logits_QV[:1], [0]).token_ids_Q[0]
    assert found.token_ids_Q[2] == int(logits_QV[2].argmax())


@pytest.mark.parametrize("penalty", [1e-40, 1e-50], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_penalty_that_overflows_fails_its_row_only(backend: Backend, penalty: float, temperature: float) -> None:
    """Divided by that, fp32 logits are infinite: no token may come out as if it were meant."""
    bench = Bench(backend, [SamplingParams(temperature=temperature),
                            SamplingParams(temperature=temperature, repetition_penalty=penalty, logprobs=1)])
    logits_QV = random_logits(2, seed=7).abs() + 1.0
    found = bench.draw(logits_QV)
    assert found.failed == {1: EDITED_AWAY}
    assert found.token_ids_Q[0] == bench.draw(logits_QV[:1], [0]).token_ids_Q[0]


@pytest.mark.parametrize("num_top", [0, 1, 5, 64])
def test_logprobs_are_those_of_the_model(backend: Backend, num_top: int) -> None:
    """Of the logits as they came, whatever the row does to them afterwards."""
    edits = SamplingParams(temperature=0.4, top_k=3, logit_bias={7: 20.0}, frequency_penalty=1.0, logprobs=num_top)
    bench = Bench(backend, [edits, SamplingParams(), dataclasses.replace(edits, logprobs=2, temperature=0.0)])
    logits_QV = random_logits(3, seed=5)
    found = bench.draw(logits_QV)
    assert set(found.logprobs) == {0, 2}
    for q, num in ((0, num_top), (2, 2)):
        entry, logprobs_V = found.logprobs[q], torch.log_softmax(logits_QV[q].double(), dim=0)
        ranked = logprobs_V.argsort(descending=True).tolist()
        assert entry.token_id == found.token_ids_Q[q]
        assert ranked[entry.rank - 1] == entry.token_id
        assert list(entry.top_ids) == ranked[:num]
        np.testing.assert_allclose([entry.logprob, *entry.top_logprobs],
                                   logprobs_V[[entry.token_id, *entry.top_ids]].numpy(), atol=1e-5)


def test_released_rows_leave_no_edits_behind(backend: Backend) -> None:
    bench = Bench(backend, [SamplingParams(temperature=0.0, allowed_token_ids=(1,))])
    bench.rows.release(0)
    bench.sampler.release(0)
    new = NewRow(row=0, request_id="b", token_ids=np.ones(3, np.int32), num_prompt_tokens=3, num_computed_tokens=0,
                 block_ids=np.zeros(1, np.int32), sampling=SamplingParams(temperature=0.0), eos_token_ids=EOS, seed=0)
    bench.rows.enter(new)
    bench.sampler.enter(new)
    logits_QV = random_logits(1, seed=6)
    assert bench.draw(logits_QV).token_ids_Q.tolist() == logits_QV.argmax(dim=1).tolist()
