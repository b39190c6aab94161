"""Embedding table and head, whichever of them a checkpoint brings and however it names them, as in transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from backends.backend import Backend
from tests.models.checkpoints import PROMPT
from tests.models.harness import PagedRunner
from xllm import LLM, PoolingParams, SamplingParams
from xllm.errors import ModelError, RequestError
from xllm.models.causal_lm import CausalLM
from xllm.models.loader import load_model

Tensors = dict[str, torch.Tensor]
IDS = PROMPT[:17]
ARCHITECTURES = {"Llama": "llama-gqa", "Mistral": "mistral-window-21", "Qwen2": "qwen2", "Qwen3": "qwen3"}


def without_prefix(tensors: Tensors) -> Tensors:
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name != "lm_head.weight"}


def without_head(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}


def edit(folder: Path, change: Callable[[Tensors], Tensors] = dict, **config: Any) -> Path:
    file, tensors = folder / "config.json", folder / "model.safetensors"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    save_file({name: tensor.clone() for name, tensor in change(load_file(tensors)).items()}, tensors,
              metadata={"format": "pt"})
    return folder


def load(folder: Path, backend: Backend) -> CausalLM:
    return load_model(folder, backend=backend, dtype=torch.float32)


@torch.inference_mode()
def logits_of_transformers(folder: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model(torch.tensor([IDS])).logits[0]


@torch.inference_mode()
def vector_of_transformers(folder: Path) -> torch.Tensor:
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32)
    return model(torch.tensor([IDS])).last_hidden_state[0, -1]


@pytest.mark.parametrize("layout", ["bare", "bare-causal", "prefixed"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_embedding_checkpoint_makes_embeddings_and_no_tokens(make_checkpoint: Callable[[str], Path], name: str,
                                                                layout: str) -> None:
    folder = edit(make_checkpoint(ARCHITECTURES[name]), without_head if layout == "prefixed" else without_prefix,
                  architectures=[f"{name}ForCausalLM" if layout == "bare-causal" else f"{name}Model"])
    with LLM(model=str(folder), skip_tokenizer_init=True, dtype="float32", max_model_len=64, num_threads=1) as llm:
        prompt = {"prompt_token_ids": IDS}
        vector = llm.embed([prompt], PoolingParams(normalize=False), use_tqdm=False)[0].embedding
        torch.testing.assert_close(torch.tensor(vector), vector_of_transformers(folder), atol=2e-4, rtol=1e-3)
        with pytest.raises(RequestError, match="no lm_head"):
            llm.generate([prompt], SamplingParams(max_tokens=2), use_tqdm=False)


@pytest.mark.parametrize("change", [without_head, without_prefix, dict], ids=["plain", "bare", "equal-head"])
def test_tied_ends_are_one_matrix(make_checkpoint: Callable[[str], Path], backend: Backend, change: Any,
                                  caplog: pytest.LogCaptureFixture) -> None:
    def equal(tensors: Tensors) -> Tensors:
        return change({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]})

    folder = edit(make_checkpoint("llama-tied"), equal)
    found = PagedRunner(load(folder, backend), backend).step({"a": IDS})["a"]
    torch.testing.assert_close(found, logits_of_transformers(folder), atol=2e-4, rtol=1e-3)
    assert not [record for record in caplog.records if record.name.startswith("xllm")]


def test_tied_but_with_another_head(make_checkpoint: Callable[[str], Path], backend: Backend,
                                    caplog: pytest.LogCaptureFixture) -> None:
    """transformers 5 believes the tensors and warns; so do we."""
    folder = edit(make_checkpoint("llama-tied"), lambda tensors: {
        **tensors, "lm_head.weight": torch.randn(211, 64, generator=torch.Generator().manual_seed(4))})
    found = PagedRunner(load(folder, backend), backend).step({"a": IDS})["a"]
    torch.testing.assert_close(found, logits_of_transformers(folder), atol=1e-3, rtol=1e-3)
    assert "tie_word_embeddings is true" in caplog.text and "lm_head.weight" in caplog.text
    tied = edit(folder, without_head)
    assert not torch.allclose(found, logits_of_transformers(tied), atol=0.1)


def test_tied_and_only_the_head_is_there(make_checkpoint: Callable[[str], Path], backend: Backend) -> None:
    folder = edit(make_checkpoint("llama-tied"), lambda tensors: {
        name.replace("model.embed_tokens", "lm_head"): tensor for name, tensor in tensors.items()})
    found = PagedRunner(load(folder, backend), backend).step({"a": IDS})["a"]
    torch.testing.assert_close(found, logits_of_transformers(folder), atol=2e-4, rtol=1e-3)


def test_untied_without_a_head_is_refused(make_checkpoint: Callable[[str], Path], backend: Backend) -> None:
    folder = edit(make_checkpoint("llama-gqa"), without_head)
    with pytest.raises(ModelError, match=r"'lm_head\.weight' is missing.*tie_word_embeddings"):
        load(folder, backend)
