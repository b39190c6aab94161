"""Random weights in place of a checkpoint's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.gpu.shapes import SHAPES
from xllm import LLM, SamplingParams
from xllm.errors import ConfigError, ModelError
from xllm.models.dummy_weights import dummy_weight

CPU = torch.device("cpu")


def generate(folder: Path, **settings: object) -> list[int]:
    with LLM(str(folder), skip_tokenizer_init=True, max_model_len=64, num_kv_blocks=16, num_threads=1,
             **settings) as llm:  # fmt: skip
        params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
        return llm.generate({"prompt_token_ids": [5, 3, 8]}, params, use_tqdm=False)[0].outputs[0].token_ids


def test_a_config_alone_makes_an_engine_and_always_the_same(tmp_path: Path) -> None:
    folder = SHAPES["tiny"].write(tmp_path / "tiny")
    assert generate(folder, load_format="dummy") == generate(folder, load_format="dummy")
    with pytest.raises(ModelError, match="safetensors"):
        generate(folder)


def test_it_does_not_go_with_a_store_that_outlives_the_weights(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="load_format"):
        generate(SHAPES["tiny"].write(tmp_path), load_format="dummy", host_cache_size="1MiB", disk_cache_size="1MiB",
                 disk_cache_dir=str(tmp_path / "disk"))  # fmt: skip


def test_weights_are_told_apart_by_name_and_keep_the_size_of_what_they_multiply() -> None:
    a, again, b = (dummy_weight(name, (400, 300), dtype=torch.float32, device=CPU) for name in "aab")
    assert torch.equal(a, again) and not torch.equal(a, b)
    x = torch.randn(50, 300)
    assert (x @ a.T).std().item() == pytest.approx(1.0, abs=0.05)
    norm = dummy_weight("model.norm.weight", (5000,), dtype=torch.float32, device=CPU)
    assert norm.mean().item() == pytest.approx(1.0, abs=0.02)


def test_transformers_has_the_same_weights(tmp_path: Path) -> None:
    """What the baselines run: the engine's tokens are transformers' own."""
    from benchmarks.gpu.baseline_worker import load
    from benchmarks.gpu.profile import TINY

    torch.set_num_threads(1)
    tokens = generate(SHAPES["tiny"].write(tmp_path / "tiny"), load_format="dummy")
    model = load(TINY, "cpu", tmp_path, "eager")
    with torch.inference_mode():
        logits = model(torch.tensor([[5, 3, 8, *tokens]])).logits[0, 2:-1]
    assert logits.argmax(-1).tolist() == tokens
