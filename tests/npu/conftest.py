"""These tests need an NPU: the emulated one that `make test-npu` brings, or with XLLM_NPU_REAL=1 a real one."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import emulated_npu

IS_REAL = os.environ.get("XLLM_NPU_REAL") == "1"
HAS_NPU = IS_REAL or emulated_npu.is_active()

if HAS_NPU:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the wheel's own sources provoke
        import torch_npu  # noqa: F401


def pytest_report_header() -> str:
    if IS_REAL:
        return "npu: the machine's own"
    if HAS_NPU:
        return "npu: the real torch_npu on an emulated ACL runtime"
    return (
        f"npu: tests/npu NOT RUN: {emulated_npu.reason() or 'this is no emulated process; `make test-npu` starts one'}"
    )


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    if not HAS_NPU or (IS_REAL and collection_path.name.startswith("test_emulator")):
        return True
    return None


@pytest.fixture(autouse=True)
def leaves_the_device_idle() -> Iterator[None]:
    """A test that leaves work queued, or a failure of the device unread, would break the next one."""
    yield
    if HAS_NPU and not IS_REAL:
        from tests.emulated_npu.install import machine

        running = machine()
        left = [lane.name for lane in running.streams.values() if lane.tasks] if running.random is None else []
        failure = running.failure
        running.drop_all()
        running.set_order(os.environ.get("EMULATED_NPU_ORDER"))
        assert failure is None, failure
        assert not left, f"work is still queued on {left}"
