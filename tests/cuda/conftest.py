"""The CUDA op set on CPU tensors, its kernels interpreted as Python.

Triton decides when a kernel is defined whether it is interpreted, so these tests have a process of their own:
`TRITON_INTERPRET=1 pytest tests/cuda`, as `make test` does. In any other only `test_without_a_device.py` is collected.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from backends.opset import OpSet
from backends.reference.kv import keys_BKHP
from tests.ops.conftest import Paged, seed_and_poison, spread_cache

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None
ANYWHERE = {"test_without_a_device.py"}
TESTS = {path.name for path in Path(__file__).parent.glob("test_*.py")}
collect_ignore = [] if INTERPRETED else sorted(TESTS - ANYWHERE)

__all__ = ["CudaPaged", "seed_and_poison"]


class CudaPaged(Paged):
    """A step over sequences in the layout of `cuda_ops/kv.py`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        cache = spread_cache(*(self.k_cache.shape[i] for i in (0, 2, 1, 3)), self.gap)
        self.k_cache = cache.copy_(keys_BKHP(self.k_cache).transpose(2, 3))

    def to(self, dtype: torch.dtype) -> CudaPaged:
        self.k_cache, self.v_cache = self.k_cache.to(dtype), self.v_cache.to(dtype)
        return self


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where a GPU makes an inf or a NaN and says nothing, NumPy warns."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning"))


@pytest.fixture(scope="session")
def ops() -> OpSet:
    from backends.cuda import OPS

    return OPS
