"""The seam for models that are not dense: one file, its layers and one line in the registry make an engine run them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from backends.backend import Backend
from tests.models.harness import PagedRunner, greedy
from tests.models.toy_checkpoint import LAYERS, Naive, V, save_toy
from tests.models.toy_family import ARCHITECTURE
from xllm import LLM, SamplingParams
from xllm.models import model_registry
from xllm.models.kv_spec import KVSpec
from xllm.models.loader import load_model

LENGTHS = {1: 53, 2: 9, 5: 34, 8: 47}
PROMPTS = [[(7 * i * i + 3 * i + salt) % V for i in range(length)] for salt, length in LENGTHS.items()]
NUM_TOKENS = 24


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(model_registry.FAMILIES, ARCHITECTURE, "tests.models.toy_family")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def truth(folder: Path) -> list[list[int]]:
    naive = Naive(folder)
    found = [naive.greedy(prompt, NUM_TOKENS) for prompt in PROMPTS]
    assert all(len(set(tokens)) > 5 for tokens in found)  # a model that repeats one token would prove little
    return found


def test_logits(folder: Path, backend: Backend) -> None:
    model = load_model(folder, backend=backend, dtype=torch.float32)
    assert model.kv_specs == (KVSpec(num_heads=1, widths=(24,)), KVSpec(num_heads=2, widths=(16, 16)),
                              KVSpec(num_heads=1, widths=(24,)), KVSpec(num_heads=1, widths=(24, 24)))
    for chunks in ((53,), (5, 1, 17)):
        tokens, logits_TV = greedy(PagedRunner(model, backend), "a", PROMPTS[0], chunks, 12)
        expected_TV = Naive(folder).logits(PROMPTS[0] + tokens[:-1])
        error = (logits_TV.double() - expected_TV).abs().max() / expected_TV.abs().max()
        assert float(error) < 1e-5


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"max_num_seqs": 1, "async_scheduling": False, "enable_prefix_caching": False},
    "batched-chunked": {"max_num_batched_tokens": 19},
    "preempted": {"num_kv_blocks": 24, "watermark": 0.0, "enable_prefix_caching": False},
    "tiers": {"num_kv_blocks": 24, "watermark": 0.0, "host_cache_size": "1MiB"},
    "xtensor": {"kv_layout": "xtensor"},
    "xtensor-tiers": {"kv_layout": "xtensor", "num_kv_blocks": 24, "watermark": 0.0, "host_cache_size": "1MiB"},
    "drafts": {"speculative_method": "ngram", "num_speculative_tokens": 3},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_engine_runs_it(folder: Path, truth: list[list[int]], name: str) -> None:
    """Twice: the second time with whatever prefix is cached, on the device or below it."""
    settings = {"max_model_len": 96, "block_size": 4, "num_kv_blocks": 128, "max_num_seqs": 4, "num_threads": 1,
                "enable_chunked_prefill": True, **SETTINGS[name]}
    greedily = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    with LLM(str(folder), skip_tokenizer_init=True, **settings) as llm:
        for _ in range(2):
            outputs = llm.generate(prompts, greedily, use_tqdm=False)
            assert [list(output.outputs[0].token_ids) for output in outputs] == truth
        stats = llm.stats()
    if name == "preempted":
        assert stats.preemptions_total > 0
    if "tiers" in name:
        assert stats.cached_tokens_by_tier_total["l3"] > 0
    if name == "drafts":
        assert stats.spec_accepted_tokens_total > 0


def test_a_tensor_that_the_family_does_not_take(folder: Path, backend: Backend, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from xllm.errors import ModelError

    save_toy(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, f"model.layers.{LAYERS}.mlp.router.weight": torch.zeros(3, 32)},
              tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"'model\.layers\.4\.mlp\.router\.weight' is not part of"):
        load_model(tmp_path, backend=backend, dtype=torch.float32)
