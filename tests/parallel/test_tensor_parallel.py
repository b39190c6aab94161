"""Tensor parallelism between real processes over gloo: layers, whole models, and the runner above them."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from backends import get_backend
from tests.models.checkpoints import BY_ID, save_checkpoint
from tests.models.fp8_checkpoints import to_fp8
from tests.parallel.ranks import Ranks
from xllm import env
from xllm.errors import ConfigError
from xllm.models.loader import load_model
from xllm.models.model_registry import read_model_config
from xllm.parallel.groups import Group
from xllm.parallel.parallel_context import ParallelContext

CASES = "tests.parallel.tensor_cases"
# By what is special about them: GQA, biases that are added once, kv heads that all hold, a tied table of 211 rows,
# latents that all hold, heads rotated in part.
MODELS = [("llama-gqa", 2), ("llama-attention-bias", 2), ("llama-mqa", 2), ("llama-gqa", 4),
          ("qwen3-tied-head-dim-32-bf16", 2), ("qwen2-window-13-from-layer-1", 2), ("qwen2-moe", 2),
          ("mixtral-stacked-window-21", 2), ("deepseek-v3-moe", 2),
          ("glm4-moe-bias-qk-norm-scaled", 2)]


@pytest.fixture(scope="module")
def kernels() -> str:
    """Compiled once, not by each rank: where every engine of this machine finds them."""
    get_backend("cpu", cache_dir=env.cache_dir())
    return str(env.cache_dir())


@pytest.mark.parametrize("size", [2, 3])
def test_a_column_and_a_row_layer(ranks: Ranks, size: int) -> None:
    ranks.check(f"{CASES}:column_and_row", size)


def test_experts_in_parts(ranks: Ranks) -> None:
    ranks.check(f"{CASES}:experts_in_parts", 2)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_vocabulary_that_does_not_divide(ranks: Ranks, size: int) -> None:
    ranks.check(f"{CASES}:both_ends", size)


@pytest.mark.parametrize(("variant", "size"), MODELS, ids=str)
def test_a_whole_model(ranks: Ranks, kernels: str, tmp_path: Path, variant: str, size: int) -> None:
    """All ranks print the same tokens, and the same bits of all logits."""
    folder = save_checkpoint(BY_ID[variant], tmp_path)
    assert len(set(ranks.check(f"{CASES}:whole_model", size, kernels=kernels, folder=str(folder)))) == 1


def test_a_whole_model_of_fp8(ranks: Ranks, kernels: str, tmp_path: Path) -> None:
    """The cuts, at 20, 56 and others, go through blocks of 24 x 40; experts are stacked, and the shared one is not."""
    folder = save_checkpoint(replace(BY_ID["qwen2-moe-windows-layer-1-plain"], stacked=True), tmp_path / "fp8")
    to_fp8(folder, (24, 40), tmp_path / "plain")
    assert len(set(ranks.check(f"{CASES}:whole_model", 2, kernels=kernels, folder=str(folder)))) == 1


@pytest.mark.parametrize("variant", ["llama-gqa", "llama-mqa", "llama-mha"])
def test_which_sizes_can_share_a_model(tmp_path: Path, variant: str) -> None:
    """What is said of a config is what a rank finds that makes its layers."""
    folder = save_checkpoint(BY_ID[variant], tmp_path)
    config, backend = read_model_config(folder), get_backend("cpu", compiled=False)

    def make(size: int) -> None:
        load_model(folder, backend=backend, dtype=torch.float32, max_model_len=64, load_format="dummy",
                   parallel=ParallelContext(tp=Group(0, size, None)))

    for act in (config.check_shared, make):
        for size in range(1, 9):
            with nullcontext() if size in (1, 2, 4) else pytest.raises(ConfigError, match=r"does not divide|multiple"):
                act(size)


def test_random_weights(ranks: Ranks, kernels: str, tmp_path: Path) -> None:
    folder = save_checkpoint(BY_ID["llama-gqa"], tmp_path)
    (folder / "model.safetensors").unlink()
    ranks.check(f"{CASES}:whole_model", 2, kernels=kernels, folder=str(folder), load_format="dummy")


@pytest.mark.parametrize("settings", [{}, {"graph_mode": "checked"}, {"kv_layout": "xtensor"},
                                      {"kv_cache_dtype": "int8"}], ids=str)
def test_the_runner_does_the_same_with_a_share(ranks: Ranks, kernels: str, tmp_path: Path,
                                               settings: dict[str, object]) -> None:
    """In graphs the collectives are part of what is captured and replayed."""
    folder = save_checkpoint(BY_ID["llama-gqa"], tmp_path)
    texts = ranks.check(f"{CASES}:through_the_runner", 2, kernels=kernels, folder=str(folder), settings=settings)
    assert len(set(texts)) == 1
    assert (int(texts[0].split()[-1]) > 0) == ("graph_mode" in settings)
