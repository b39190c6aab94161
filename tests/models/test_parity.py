"""Every kind of checkpoint gives transformers' logits and tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from backends.backend import Backend
from xllm.models.causal_lm import CausalLM
from xllm.models.loader import load_model

from .checkpoints import BY_ID, NUM_NEW_TOKENS, PROMPT, VARIANTS, Truth, save_checkpoint, transformers_greedy
from .harness import PagedRunner, greedy

MAX_RELATIVE_ERROR = 1e-4


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda variant: variant.id)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(request.param, tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def truth(checkpoint: Path) -> Truth:
    return transformers_greedy(checkpoint)


@pytest.fixture(scope="module")
def model(checkpoint: Path, backend: Backend) -> CausalLM:
    return load_model(checkpoint, backend=backend, dtype=torch.float32, max_model_len=128)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("chunk_sizes", [(37,), (1, 5, 7, 11, 13), (3,)], ids=lambda sizes: f"chunks-{sizes}")
def test_greedy_decoding_equals_transformers(model: CausalLM, truth: Truth, backend: Backend,
                                             chunk_sizes: tuple[int, ...]) -> None:
    tokens, logits_TV = greedy(PagedRunner(model, backend), "a", PROMPT, chunk_sizes, NUM_NEW_TOKENS)
    assert tokens == truth.tokens
    assert relative_error(logits_TV, truth.logits_TV) <= MAX_RELATIVE_ERROR


def test_prefill_and_decode_share_a_step(model: CausalLM, truth: Truth, backend: Backend) -> None:
    """Three sequences in different phases, one pass: each gets what it would get alone."""
    sequence = PROMPT + truth.tokens
    runner = PagedRunner(model, backend, seed=3)
    runner.step({"decoding": sequence[:41], "chunked": sequence[:18]})
    found = runner.step({"chunked": sequence[18:29], "new": PROMPT, "decoding": sequence[41:42]})
    expected = {"chunked": truth.logits_TV[18:29], "new": truth.logits_TV[:37], "decoding": truth.logits_TV[41:42]}
    for name, logits_TV in found.items():
        assert relative_error(logits_TV, expected[name]) <= MAX_RELATIVE_ERROR, name


@pytest.mark.parametrize("variant_id", ["llama-attention-bias", "qwen3-tied-head-dim-32-bf16"])
def test_bf16_is_close_to_fp32(variant_id: str, tmp_path: Path, backend: Backend) -> None:
    folder = save_checkpoint(BY_ID[variant_id], tmp_path)
    logits = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = load_model(folder, backend=backend, dtype=dtype, max_model_len=128)
        logits[dtype] = PagedRunner(model, backend, kv_dtype=dtype).step({"a": PROMPT})["a"]
        assert logits[dtype].dtype == torch.float32
    error = (logits[torch.bfloat16] - logits[torch.float32]).norm() / logits[torch.float32].norm()
    assert 0 < float(error) < 0.03


def test_truth_is_not_flat(truth: Truth) -> None:
    """Guards the comparison itself: a model that repeats one token or hardly prefers any would prove little."""
    assert len(set(truth.tokens)) > 5
    assert float(truth.logits_TV.std(dim=-1).min()) > 0.3
