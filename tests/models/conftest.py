"""Fixtures of the model tests: the CPU backend, and checkpoints saved once per module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from backends import get_backend
from backends.backend import Backend
from xllm import env

from .checkpoints import BY_ID, save_checkpoint


@pytest.fixture(scope="session")
def backend() -> Backend:
    return get_backend("cpu", cache_dir=env.cache_dir())


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small are slower on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> Callable[[str], Path]:
    """Save a variant's checkpoint, for a test to damage."""
    return lambda variant_id: save_checkpoint(BY_ID[variant_id], tmp_path / variant_id)
