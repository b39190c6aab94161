"""Fixtures of the runner tests: one tiny model on the CPU backend, and drivers that plan by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from backends import get_backend
from backends.backend import Backend
from tests.runner.harness import Driver, make_config
from tests.runner.tiny_model import Truth, save_checkpoint, transformers_greedy
from xllm import env
from xllm.models.causal_lm import CausalLM
from xllm.models.loader import load_model
from xllm.runner.model_runner import ModelRunner


@pytest.fixture(scope="session")
def backend() -> Backend:
    return get_backend("cpu", cache_dir=env.cache_dir())


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small are slower on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="session")
def truth(checkpoint: Path) -> Truth:
    return transformers_greedy(checkpoint)


@pytest.fixture(scope="session")
def model(checkpoint: Path, backend: Backend) -> CausalLM:
    return load_model(checkpoint, backend=backend, dtype=torch.float32, max_model_len=128)


@pytest.fixture
def make_driver(model: CausalLM, backend: Backend) -> Callable[..., Driver]:
    """A driver over a fresh runner; keywords are engine settings."""

    def make(**settings: object) -> Driver:
        config = make_config(**settings)
        return Driver(ModelRunner(config, backend, model, num_blocks=64), num_blocks=64)

    return make
