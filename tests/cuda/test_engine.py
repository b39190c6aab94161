"""Whole engines over the CUDA operators, interpreted: they generate what they generate over the CPU's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import backends
from backends import cuda_latent
from backends.cpu.cpu import CpuBackend
from cuda_ops import latent, latent_expanded
from cuda_ops.kv import cache_shape
from graph.checking import CheckingCapturer
from tests.models import checkpoints
from tests.models.checkpoints import BY_ID
from tests.runner.tiny_model import PROMPT, save_checkpoint
from xllm import LLM, SamplingParams
from xllm.runner import warm_up

PROMPTS = [PROMPT[:25], [*PROMPT[:18], 3, 1, 4], [7, 8, 9] * 4]
FEATURES = {
    "chunked": {"max_num_batched_tokens": 11},
    "prefix and tiers": {"max_num_seqs": 1, "enable_prefix_caching": True, "host_cache_size": "1MiB"},
    "drafts": {"speculative_method": "ngram"},
    "xtensor": {"kv_layout": "xtensor", "max_num_batched_tokens": 29},
    "int8": {"quantization": "int8"},
    "fp8": {"quantization": "fp8"},
    "KV of int8": {"kv_cache_dtype": "int8", "max_num_batched_tokens": 11, "enable_prefix_caching": True},
    "KV of fp8": {"kv_cache_dtype": "fp8", "max_num_seqs": 1, "enable_prefix_caching": True, "host_cache_size": "1MiB"},
    "w8a8": {"quantization": "w8a8"},
}  # fmt: skip
LATENT_FEATURES = {
    "chunked and prefix": {"max_num_batched_tokens": 13, "max_num_seqs": 1, "enable_prefix_caching": True},
    "xtensor, KV of int8, tiers": {"kv_layout": "xtensor", "kv_cache_dtype": "int8", "host_cache_size": "1MiB",
                                   "max_num_batched_tokens": 29},
}  # fmt: skip


class InterpretedBackend(CpuBackend):
    """A CPU with the operators and the layout of CUDA."""

    def __init__(self, ops: Any):
        super().__init__(compiled=False)
        self.ops = ops

    def kv_cache_shape(self, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int) -> tuple[int, ...]:
        return cache_shape(num_blocks, block_size, num_kv_heads, head_dim)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module")
def latent_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    plain = BY_ID["deepseek-v3"]
    fewer = {**plain.changes, "num_hidden_layers": 1, "first_k_dense_replace": 1}
    return checkpoints.save_checkpoint(replace(plain, changes=fewer), tmp_path_factory.mktemp("deepseek"))


def generate(checkpoint: Path, prompts: list[list[int]] = PROMPTS, **settings: Any) -> list[list[int]]:
    sampling = [SamplingParams(temperature=0, max_tokens=5, ignore_eos=True),
                SamplingParams(temperature=0.8, top_p=0.9, top_k=20, seed=1, max_tokens=5, ignore_eos=True,
                               repetition_penalty=1.3, frequency_penalty=0.2, presence_penalty=-0.1,
                               logit_bias={3: 2.0}, allowed_token_ids=tuple(range(2, 90)))]
    with LLM(model=str(checkpoint), skip_tokenizer_init=True, dtype="float32", num_kv_blocks=64, max_model_len=64,
             num_threads=1, **settings) as llm:  # fmt: skip
        outputs = llm.generate([{"prompt_token_ids": tokens} for tokens in prompts],
                               [sampling[i % 2] for i in range(len(prompts))], use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.parametrize("feature", FEATURES)
def test_same_tokens_as_on_the_cpu(checkpoint: Path, ops: Any, monkeypatch: pytest.MonkeyPatch, feature: str) -> None:
    expected = generate(checkpoint, **FEATURES[feature])
    monkeypatch.setattr(backends, "get_backend", lambda *_, **__: InterpretedBackend(ops))
    assert generate(checkpoint, **FEATURES[feature]) == expected


class PlansInside(CheckingCapturer):
    """As on CUDA, where a graph holds the plans of attention too."""

    plans_in_graph = True


@pytest.mark.usefixtures("unseen_kernels")
def test_experts_in_graphs(tmp_path: Path, ops: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are checked for numbers read on the host, and for what padding leaves behind."""
    variant, capturer = BY_ID["qwen3-moe"], PlansInside()
    fewer = replace(variant, changes={**variant.changes, "num_hidden_layers": 2})
    folder = checkpoints.save_checkpoint(fewer, tmp_path)
    prompts, settings = [PROMPT[:7], PROMPT[2:4]], {"max_num_batched_tokens": 5, "max_num_seqs": 2}
    expected = generate(folder, prompts, **settings)
    backend = InterpretedBackend(ops)
    backend.capturer = capturer
    monkeypatch.setattr(backends, "get_backend", lambda *_, **__: backend)
    assert generate(folder, prompts, **settings) == expected and capturer.num_replays > 3


@pytest.mark.parametrize("feature", LATENT_FEATURES)
def test_same_tokens_of_a_model_with_latents(latent_checkpoint: Path, ops: Any, monkeypatch: pytest.MonkeyPatch,
                                             expansions: list[int], feature: str) -> None:
    expected = generate(latent_checkpoint, **LATENT_FEATURES[feature])
    monkeypatch.setattr(backends, "get_backend", lambda *_, **__: InterpretedBackend(ops))
    assert generate(latent_checkpoint, **LATENT_FEATURES[feature]) == expected and expansions


@pytest.fixture
def expansions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many positions each call expanded, where it is done for whatever saves a multiplication."""
    found, attend = [], latent_expanded.attend

    def attended(*args: Any, **options: Any) -> None:
        found.append(args[4].num_positions)
        attend(*args, **options)

    monkeypatch.setattr(latent_expanded, "attend", attended)
    monkeypatch.setattr(cuda_latent, "LEAST_SAVED", 0)
    return found


@pytest.mark.usefixtures("unseen_kernels")
def test_what_is_captured_is_absorbed(latent_checkpoint: Path, ops: Any, monkeypatch: pytest.MonkeyPatch,
                                      expansions: list[int]) -> None:
    """Chunks, too: a replay has other lengths than the capture had."""
    prompts, settings = [PROMPT[:12]], {"max_num_batched_tokens": 12, "max_num_seqs": 1}
    expected = generate(latent_checkpoint, prompts, **settings)
    backend, capturer = InterpretedBackend(ops), PlansInside()
    backend.capturer = capturer
    monkeypatch.setattr(backends, "get_backend", lambda *_, **__: backend)
    assert generate(latent_checkpoint, prompts, graph_max_prefill_tokens=16, **settings) == expected
    assert capturer.num_replays > 3 and expansions == []


@pytest.mark.usefixtures("unseen_kernels")
def test_both_forms_are_warmed_up(latent_checkpoint: Path, ops: Any, monkeypatch: pytest.MonkeyPatch,
                                  expansions: list[int]) -> None:
    """The kernels that a first prompt needs are there before it, whichever form it takes."""
    absorbed, absorb = [], latent.latent_attention
    monkeypatch.setattr(latent, "latent_attention", lambda q_TNX, *args, **options: absorbed.append(len(q_TNX))
                        or absorb(q_TNX, *args, **options))
    monkeypatch.setattr(cuda_latent, "LEAST_SAVED", 4 * 700)  # by four heads, which nine tokens do not save
    monkeypatch.setattr(warm_up, "FEW_TOKENS", 9)
    backend = InterpretedBackend(ops)
    backend.capturer = PlansInside()
    monkeypatch.setattr(backends, "get_backend", lambda *_, **__: backend)
    with LLM(model=str(latent_checkpoint), skip_tokenizer_init=True, dtype="float32", num_kv_blocks=2, block_size=16,
             max_model_len=32, num_threads=1, max_num_batched_tokens=12, kv_layout="xtensor", graph_warmup_seqs=1):
        pass
    # The longest chunk behind others is absorbed at these widths.
    assert expansions == [12] and {9, 12} <= set(absorbed)
