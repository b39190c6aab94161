"""Whole engines: the number of CPU threads, and its changes while they run, are in no token and no logprob."""

from __future__ import annotations

from typing import Any

import pytest

from backends.cpu import threads as cpu_threads
from tests.llm.conftest import SETTINGS
from tests.ops.test_cpu_threads import Flapping
from xllm import LLM, SamplingParams

PROMPTS = [[3 + i * 7 % 1000 for i in range(length)] for length in (150, 40, 9)]  # products of all sizes


def generate(**settings: Any) -> tuple[list[Any], int]:
    """Tokens with their logprobs; how often the number of threads was lowered."""
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=3)
    with LLM(**{**SETTINGS, **settings}) as llm:
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in PROMPTS], params, use_tqdm=False)
        threads = llm.stats().threads
    found = [(list(o.outputs[0].token_ids), [{i: e.logprob for i, e in at.items()} for at in o.outputs[0].logprobs])
             for o in outputs]
    return found, 0 if threads is None else threads.lowered_total


@pytest.mark.parametrize("quantization", [None, "w8a8"])
def test_the_same_bits_while_the_number_of_threads_changes(quantization: str | None,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    one, _ = generate(num_threads=1, quantization=quantization)
    two, lowered = generate(num_threads=2, quantization=quantization, adaptive_threads=False)
    assert two == one and lowered == 0
    monkeypatch.setattr(cpu_threads, "RunDelays", Flapping)
    monkeypatch.setattr(cpu_threads, "WINDOW_S", 0.0)
    monkeypatch.setattr(cpu_threads, "TRIAL_S", 0.0)
    changing, lowered = generate(num_threads=3, quantization=quantization)
    assert changing == one
    assert lowered >= 1
