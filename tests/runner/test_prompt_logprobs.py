"""Logprobs of prompt and output on the real model, against transformers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from tests.runner.harness import Driver
from tests.runner.tiny_model import NUM_NEW_TOKENS, PROMPT, Truth
from xllm.request import SamplingParams
from xllm.runner import model_runner

MakeDriver = Callable[..., Driver]
SAMPLING = SamplingParams(temperature=0.0, logprobs=4, prompt_logprobs=3, max_tokens=None)


@pytest.mark.parametrize("chunks", [[37], [1, 36], [5, 5, 5, 22], [36, 1], [1] * 37], ids=lambda c: f"chunks-{c[:3]}")
def test_equal_transformers(make_driver: MakeDriver, truth: Truth, monkeypatch: pytest.MonkeyPatch,
                            chunks: list[int]) -> None:
    monkeypatch.setattr(model_runner, "PROMPT_LOGITS_BYTES", 4 * 211 * 4)  # four positions at a time
    driver = make_driver()
    driver.add("other", PROMPT[:7])
    seq = driver.add("a", PROMPT, SAMPLING)
    num_entries = []
    for chunk in chunks:
        output = driver.step({"other": 0, "a": chunk})
        num_entries.append(len(output.prompt_logprobs.get(1, [])))
        assert set(output.prompt_logprobs) <= {1}
    assert num_entries[:-1] == chunks[:-1]
    driver.generate("a", NUM_NEW_TOKENS)
    assert [e.token_id for e in seq.prompt_logprobs] == PROMPT[1:]
    assert [e.token_id for e in seq.logprobs] == truth.tokens
    expected_TV = torch.log_softmax(truth.logits_TV.double(), dim=-1)
    for place, entry in enumerate([*seq.prompt_logprobs, *seq.logprobs]):
        row_V = expected_TV[place]
        num_top = 3 if place < len(PROMPT) - 1 else 4
        np.testing.assert_allclose(entry.logprob, row_V[entry.token_id].item(), atol=2e-4)
        np.testing.assert_allclose(entry.top_logprobs, row_V.topk(num_top).values.numpy(), atol=2e-4)
        assert abs(entry.rank - 1 - int((row_V > row_V[entry.token_id]).sum())) <= 1  # near ties may swap
        assert len(entry.top_ids) == num_top


def test_after_a_preemption_the_output_has_none(make_driver: MakeDriver, truth: Truth) -> None:
    """The sequence comes back with output among its known tokens: entries end with the prompt."""
    driver = make_driver()
    seq = driver.add("a", PROMPT + truth.tokens[:9], SAMPLING, num_prompt=len(PROMPT))
    for chunk in (30, 10, 0):
        driver.step({"a": chunk})
    assert [e.token_id for e in seq.prompt_logprobs] == PROMPT[1:]
    assert seq.output == truth.tokens[:10]


def test_slices_stay_within_their_bytes(make_driver: MakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_runner, "PROMPT_LOGITS_BYTES", 5 * 211 * 4)
    driver = make_driver()
    sizes: list[int] = []
    honest = driver.runner._model.compute_logits
    monkeypatch.setattr(driver.runner._model, "compute_logits",
                        lambda hidden: sizes.append(len(hidden)) or honest(hidden), raising=False)
    driver.add("a", PROMPT, SAMPLING)
    driver.step()
    assert sizes == [5] * 7 + [1, 1]
