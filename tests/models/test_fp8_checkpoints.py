"""DeepSeek's and Qwen's fp8 checkpoints mean what the plain ones mean that they stand for."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from backends.backend import Backend
from tests.models.checkpoints import BY_ID, PROMPT, save_checkpoint, transformers_greedy
from tests.models.fp8_checkpoints import PLAIN, to_fp8
from tests.models.harness import PagedRunner, greedy
from tests.models.test_parity import relative_error
from xllm.errors import ModelError
from xllm.models.loader import load_model
from xllm.models.model_registry import read_model_config
from xllm.models.weights import WeightSource
from xllm.parallel.shard import Shard

CPU = torch.device("cpu")
REAL, ODD = (128, 128), (24, 40)  # the second one divides no width of the tiny models
WIDE = {"hidden_size": 192, "intermediate_size": 320, "moe_intermediate_size": 136}
UP, SCALE = "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight_scale_inv"


@pytest.mark.parametrize(("variant", "block"), [
    ("qwen3", REAL), ("qwen3-attention-bias", ODD), ("llama-mlp-bias", (5, 16)), ("qwen3-moe", REAL),
    ("qwen2-moe", ODD), ("qwen3-moe-stacked-tied", (24, 20)), ("mixtral-stacked-window-21", ODD),
    ("deepseek-v3", ODD), ("deepseek-v2-lite", REAL)], ids=str)
def test_logits_equal_those_of_transformers(tmp_path: Path, backend: Backend, variant: str,
                                            block: tuple[int, int]) -> None:
    """Of the plain model; in chunks."""
    folder, plain = tmp_path / "fp8", tmp_path / "plain"
    known = BY_ID[variant]
    wide = {name: size for name, size in WIDE.items() if block == REAL and (name in known.changes or "moe" not in name)}
    save_checkpoint(replace(known, changes={**known.changes, **wide}), folder)
    to_fp8(folder, plain, block)
    truth = transformers_greedy(plain)
    model = load_model(folder, backend=backend, dtype=torch.float32, max_model_len=128)
    tokens, logits_TV = greedy(PagedRunner(model, backend), "a", PROMPT, (5, 11), 8)
    assert tokens == truth.tokens[:8]
    assert relative_error(logits_TV, truth.logits_TV[:len(logits_TV)]) <= 1e-4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return to_fp8(save_checkpoint(BY_ID["llama-tied"], tmp_path / "fp8"), tmp_path / "plain", ODD)


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16, torch.float8_e8m0fnu], ids=str)
def test_scales_may_have_other_types(tmp_path: Path, scale_dtype: torch.dtype) -> None:
    """Qwen's are bfloat16, DeepSeek-V3.1's powers of two."""
    plain, whole = tmp_path / "plain", torch.randn(50, 90)
    (tmp_path / "config.json").write_text("{}")
    save_file({"w": whole, "model.norm.weight": whole[0]}, tmp_path / "model.safetensors")
    to_fp8(tmp_path, plain, ODD, scale_dtype=scale_dtype)
    form = read_form(tmp_path)
    with WeightSource(tmp_path, dtype=torch.float32, device=CPU, fp8=form) as weights:
        assert torch.equal(weights.take("w", (50, 90)), load_file(plain / "model.safetensors")["w"])
        weights.take("model.norm.weight", (90,))
        weights.check_all_taken()


def read_form(folder: Path) -> Any:
    config = json.loads((folder / "config.json").read_text())
    return read_model_config_of(folder, config["quantization_config"])


def read_model_config_of(folder: Path, quantization: Any) -> Any:
    raise NotImplementedError
