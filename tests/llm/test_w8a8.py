"""Whole engines whose every product is of int8 weights and int8 activations."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from serving.commands.bench.kv_dtype_bench import held_out_texts, windows
from tests.llm.conftest import SETTINGS
from tests.llm.test_adapters import RANKS, write_adapter
from tests.runner.tiny_model import PROMPT, save_checkpoint
from xllm import LLM, SamplingParams
from xllm.hub import resolve_model_path

PROMPTS = ["def add(a, b):\n    return", "import os\n", "class Stack:\n    def push(self, item):\n" * 3, "x",
           "for i in range(10):\n    print(i"]
BATCHES: dict[str, dict[str, Any]] = {
    "alone": {"max_num_seqs": 1}, "chunked": {"max_num_batched_tokens": 7}, "pairs": {"max_num_seqs": 2},
    "graph": {"graph_mode": "checked"}, "drafts": {"speculative_method": "ngram"},
    "inline": {"async_scheduling": False}, "xtensor": {"kv_layout": "xtensor", "max_num_batched_tokens": 13},
}


def generate(llm: LLM) -> list[tuple[int, ...]]:
    outputs = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True), use_tqdm=False)
    return [tuple(output.outputs[0].token_ids) for output in outputs]


@pytest.fixture(scope="module")
def together() -> list[tuple[int, ...]]:
    with LLM(**SETTINGS, quantization="w8a8") as llm:
        first = generate(llm)
        assert generate(llm) == first, "with what the first turn left in the cache"
    return first


@pytest.mark.parametrize("batch", BATCHES)
def test_a_sequence_does_not_see_its_batch(together: list[tuple[int, ...]], batch: str) -> None:
    with LLM(**{**SETTINGS, "quantization": "w8a8", **BATCHES[batch]}) as llm:
        assert generate(llm) == together


def test_it_foretells_held_out_text_as_well() -> None:
    """In bits per byte; less than 1 % more than fp32, and not the very same."""
    path = resolve_model_path(None)
    found = [w for w, _ in zip(windows(path, held_out_texts(), 1, 255), range(6))]
    params, bits = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0), {}
    for quantization in (None, "w8a8"):
        with LLM(**SETTINGS, quantization=quantization) as llm:
            outputs = llm.generate([{"prompt_token_ids": w.token_ids} for w in found], params, use_tqdm=False)
        nats = -sum(next(iter(p.values())).logprob for output in outputs for p in output.prompt_logprobs[1:])
        bits[quantization] = nats / math.log(2) / sum(w.num_bytes for w in found)
    assert bits[None] < 2 and 1e-5 < abs(bits["w8a8"] / bits[None] - 1) < 0.01, bits


def distance(one: list[float], other: list[float]) -> float:
    return sum(abs(a - b) for a, b in zip(one, other, strict=True)) / len(one)


def test_adapters_beside_it(tmp_path: Path) -> None:
    """They change it as they change the model in fp32, and a batch of them is what each is alone."""
    base = save_checkpoint(tmp_path / "base")
    shapes = {name: tensor.shape for name, tensor in load_file(base / "model.safetensors").items()}
    for name in RANKS:
        write_adapter(tmp_path / name, name, shapes)
    modules = tuple(f"{name}={tmp_path / name}" for name in RANKS)
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)

    def logprobs(names: list[str], quantization: str | None) -> list[list[float]]:
        settings = {"skip_tokenizer_init": True, "num_threads": 1, "max_model_len": 64, "num_kv_blocks": 64}
        with LLM(model=str(base), quantization=quantization, lora_modules=modules, **settings) as llm:
            outputs = llm.generate([{"prompt_token_ids": PROMPT[:25]}] * len(names), params, use_tqdm=False, lora=names)
        return [[next(iter(p.values())).logprob for p in output.prompt_logprobs[1:]] for output in outputs]

    names = ["", *RANKS]
    exact, found = logprobs(names, None), logprobs(names, "w8a8")
    alone = [logprobs([name], "w8a8")[0] for name in names]
    for mine, theirs, same in zip(found, exact, alone, strict=True):
        assert mine == pytest.approx(same, abs=1e-5)
        assert 1e-4 < distance(mine, theirs) < 0.08
    for changed in found[1:]:
        assert distance(changed, found[0]) > 0.16
