"""Speculation changes how many steps it takes, never the tokens."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from backends.backend import Backend
from tests.runner.harness import MAX_MODEL_LEN, Driver
from tests.runner.tiny_model import PROMPT
from xllm.request import SamplingParams
from xllm.runner.row_state import RowState
from xllm.runner.sampler import Sampler
from xllm.speculative.proposer import TokenHistory
from xllm.speculative.verify import num_accepted
from xllm.step import NewRow

MakeDriver = Callable[..., Driver]
SAMPLINGS = {
    "greedy": {"temperature": 0.0},
    "seeded": {"temperature": 1.0, "top_k": 20},
    "penalties": {"temperature": 0.7, "presence_penalty": 1.1, "frequency_penalty": 0.6, "repetition_penalty": 1.3},
    "greedy-penalties": {"temperature": 0.0, "frequency_penalty": 0.9, "repetition_penalty": 1.2},
    "edits": {"temperature": 0.9, "min_tokens": 9, "stop_token_ids": (3, 17, 80, 120), "logit_bias": {5: 2.0, 9: -3.0},
              "bad_words_token_ids": ((5,), (40, 41), (17, 3))},
}
LENGTH = 40


class Oracle:
    """Knows the output in advance and drafts it, with every fifth (or so) token wrong."""

    def __init__(self, answers: dict[int, list[int]], *, wrong_every: int = 5):
        self.answers = answers
        self.wrong_every = wrong_every

    def propose(self, rows_S: np.ndarray, max_drafts_S: np.ndarray,
                history: TokenHistory) -> tuple[np.ndarray, np.ndarray]:
        drafts_SR = np.full((len(rows_S), int(max_drafts_S.max())), -1, dtype=np.int32)
        num_drafts_S = np.zeros(len(rows_S), dtype=np.int32)
        for i, row in enumerate(rows_S.tolist()):
            start = int(history.num_tokens[row])
            drafts = [token if (start + j) % self.wrong_every else (token + 1) % 211
                      for j, token in enumerate(self.answers[row][start:start + int(max_drafts_S[i])])]
            drafts_SR[i, : len(drafts)] = drafts
            num_drafts_S[i] = len(drafts)
        return drafts_SR, num_drafts_S


@pytest.mark.parametrize("name", SAMPLINGS)
@pytest.mark.parametrize("proposer", ["ngram", "oracle"])
def test_same_tokens_and_logprobs(make_driver: MakeDriver, name: str, proposer: str) -> None:
    sampling = SamplingParams(**SAMPLINGS[name], max_tokens=None, logprobs=3)
    prompts = {"a": PROMPT, "b": [9, 8, 7, 6] * 4, "c": [11]}
    plain, drafting = make_driver(), make_driver(speculative_method="ngram", prompt_lookup_min=1)
    for driver in (plain, drafting):
        for seed, (key, prompt) in enumerate(prompts.items()):
            driver.add(key, prompt, sampling, seed=seed, eos=(2, 33))
    for _ in range(LENGTH + 6):
        plain.step()
    if proposer == "oracle":
        drafting.runner.proposer = Oracle({s.row: plain.seqs[key].tokens for key, s in drafting.seqs.items()})
    while min(len(seq.output) for seq in drafting.seqs.values()) < LENGTH:
        drafting.step({key: 0 for key, seq in drafting.seqs.items() if len(seq.output) < LENGTH}, max_drafts=5)
    for key, seq in drafting.seqs.items():
        other = plain.seqs[key]
        assert seq.output[:LENGTH] == other.output[:LENGTH]
        assert [e.token_id for e in seq.logprobs[:LENGTH]] == other.output[:LENGTH]
        np.testing.assert_allclose([e.logprob for e in seq.logprobs[:LENGTH]],
                                   [e.logprob for e in other.logprobs[:LENGTH]], atol=1e-4)
    assert drafting.num_drafts > drafting.num_accepted
    if proposer == "oracle":
        assert drafting.num_steps < LENGTH / 2
        assert drafting.num_accepted > LENGTH


def test_drafts_stop_at_the_last_position(make_driver: MakeDriver) -> None:
    """Near max_model_len drafts are cut so that no token lies behind it."""
    plain, drafting = make_driver(), make_driver(speculative_method="ngram")
    for driver in (plain, drafting):
        driver.add("a", PROMPT)
    answer = PROMPT + plain.generate("a", MAX_MODEL_LEN - len(PROMPT))
    drafting.runner.proposer = Oracle({drafting.seqs["a"].row: answer})
    while len(drafting.seqs["a"].tokens) < MAX_MODEL_LEN:
        drafting.step(max_drafts=7)
    assert drafting.seqs["a"].tokens == answer


@pytest.mark.parametrize("good_drafts", [0, 1])
def test_bad_logits_count_only_where_drafts_were_accepted(make_driver: MakeDriver, monkeypatch: pytest.MonkeyPatch,
                                                          good_drafts: int) -> None:
    """The logits behind the first draft are not finite: that matters only if this draft stands."""
    driver = make_driver(speculative_method="ngram")
    driver.add("a", PROMPT)
    driver.step()
    honest = driver.runner._model.compute_logits

    def bad_second_place(hidden_SD: torch.Tensor) -> torch.Tensor:
        logits_SV = honest(hidden_SD)
        logits_SV[1] = float("nan")
        return logits_SV

    plain = make_driver()
    plain.add("a", PROMPT)
    next_token = plain.generate("a", 2)[1]
    draft = next_token if good_drafts else next_token + 1
    driver.runner.proposer = Oracle({driver.seqs["a"].row: [*driver.seqs["a"].tokens, draft]}, wrong_every=10**6)
    monkeypatch.setattr(driver.runner._model, "compute_logits", bad_second_place, raising=False)
    output = driver.step(max_drafts=1)
    assert output.num_drafts_S.tolist() == [1]
    assert list(output.failed) == [0] * good_drafts
    assert output.num_sampled_S.tolist() == [1]  # what was drawn before the bad place


def test_no_drafts_while_a_prompt_is_not_complete(make_driver: MakeDriver) -> None:
    driver = make_driver(speculative_method="ngram")
    driver.add("a", [1, 2, 3] * 6)
    assert driver.step({"a": 14}, max_drafts=4).num_drafts_S.tolist() == [0]  # though its blocks have room
    assert driver.step({"a": 0}, max_drafts=4).num_drafts_S.tolist() == [4]


def test_seeds_draw_from_the_target_distribution(backend: Backend) -> None:
    """The real sampler over 20,000 seeds, one accepted-or-not draft: pairs follow p(a) * p(b | a)."""
    num_rows, vocab, draft, prompt_len = 20_000, 4, 2, 3
    rows = RowState(max_num_seqs=num_rows, max_model_len=8, block_size=8)
    sampling = SamplingParams(temperature=0.8, top_p=0.999)
    for row in range(num_rows):
        rows.enter(NewRow(row=row, request_id="", token_ids=np.zeros(prompt_len, np.int32),
                          num_prompt_tokens=prompt_len, num_computed_tokens=0, block_ids=np.zeros(1, np.int32),
                          sampling=sampling, eos_token_ids=(), seed=row))
    sampler = Sampler(backend.ops, rows, vocab, backend.device)
    first_V = torch.tensor([0.1, 0.9, 1.0, -0.5])
    second_VV = torch.tensor([[0.0, 1.0, 0.3, 0.2], [1.0, 0.5, 0.5, 0.0], [0.2, 0.1, 1.2, 0.9], [0.0, 0.0, 0.4, 1.0]])
    every = np.arange(num_rows, dtype=np.int32)
    rows.write_drafts(every, np.full((num_rows, 1), draft, dtype=np.int32))

    def draw(offset: int, logits_SV: torch.Tensor) -> np.ndarray:
        return sampler.draw(lambda places: logits_SV[torch.from_numpy(places)], every, np.full(num_rows, offset),
                            every.astype(np.int64))[0]

    first = draw(0, first_V.expand(num_rows, vocab))
    verified = draw(1, second_VV[draft].expand(num_rows, vocab))
    accepted = num_accepted(np.stack([first, verified], axis=1), np.full((num_rows, 1), draft, dtype=np.int32))
    rows.advance(every, np.full(num_rows, prompt_len), first[:, None].astype(np.int32), np.ones(num_rows, np.int32))
    redrawn = draw(0, second_VV[torch.from_numpy(first)])
    second = np.where(accepted == 1, verified, redrawn)
    assert (verified[accepted == 1] == redrawn[accepted == 1]).all()  # the same position, the same token
    law_VV = torch.softmax(first_V.double() / 0.8, 0)[:, None] * torch.softmax(second_VV.double() / 0.8, 1)
    expected = num_rows * law_VV.numpy().ravel()
    counts = np.bincount(first * vocab + second, minlength=16)
    assert float(((counts - expected) ** 2 / expected).sum()) < 44.0  # 15 degrees: p = 1e-4
