"""What only CUDA has. Its operators' results are tested with those of all op sets, in `tests/ops`.

Triton decides when a kernel is defined whether it is interpreted, so these tests have a process of their own:
`TRITON_INTERPRET=1 pytest tests/ops tests/cuda`, as `make test` does. In any other `test_without_a_device.py` is
collected, and nothing else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch.utils._python_dispatch import _disable_current_modes

from backends.opset import OpSet
from tests.ops.conftest import INTERPRETED, seed_and_poison

ANYWHERE = {"test_without_a_device.py"}
TESTS = {path.name for path in Path(__file__).parent.glob("test_*.py")}
collect_ignore = sorted(ANYWHERE if INTERPRETED else TESTS - ANYWHERE)

__all__ = ["seed_and_poison"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where a GPU makes an inf or a NaN and says nothing, NumPy warns."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning"))


@pytest.fixture(scope="session")
def ops() -> OpSet:
    from backends.cuda import OPS

    return OPS


@pytest.fixture
def unseen_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches go past torch's dispatcher, as compiled ones do; the interpreter calls torch for each of its arguments,
    which a `TorchDispatchMode` would see."""
    from triton.runtime.interpreter import GridExecutor

    run = GridExecutor.__call__

    def unseen(executor: Any, *args: Any, **kwargs: Any) -> None:
        with _disable_current_modes():
            run(executor, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", unseen)
