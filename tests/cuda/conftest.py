"""What only CUDA has. Its operators' results are tested with those of all op sets, in `tests/ops`.

Triton decides when a kernel is defined whether it is interpreted, so these tests have a process of their own:
`TRITON_INTERPRET=1 pytest tests/ops tests/cuda`, as `make test` does. In any other only `test_without_a_device.py` is
collected.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from backends.opset import OpSet
from tests.ops.conftest import INTERPRETED, seed_and_poison

ANYWHERE = {"test_without_a_device.py"}
TESTS = {path.name for path in Path(__file__).parent.glob("test_*.py")}
collect_ignore = [] if INTERPRETED else sorted(TESTS - ANYWHERE)

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
