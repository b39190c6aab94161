"""torch.distributed between processes by HCCL, and the groups of tensor parallelism on it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.parallel.ranks import Ranks

CASES, OWN = "tests.parallel.cases", "tests.npu.collective_cases"
IS_REAL = os.environ.get("XLLM_NPU_REAL") == "1"
if IS_REAL and torch.npu.device_count() < 3:
    pytest.skip(f"groups of 3 need 3 cards, and here are {torch.npu.device_count()}", allow_module_level=True)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    started = Ranks(tmp_path_factory.mktemp("ranks"), "torch_npu", "torch._dynamo", CASES, OWN)
    yield started
    started.close()


def cards(size: int, **env: str) -> dict[str, Any]:
    """Each process sees a card of its own, as `npu:0`."""
    machine = {} if IS_REAL else {"EMULATED_NPU_DEVICES": str(size), "HCCL_EXEC_TIMEOUT": "30"}
    return {"env": {**machine, "HCCL_CONNECT_TIMEOUT": "120" if IS_REAL else "30", **env},
            "env_of": [{"ASCEND_RT_VISIBLE_DEVICES": str(rank)} for rank in range(size)]}  # fmt: skip


@pytest.mark.parametrize("size", [2, 3])
def test_groups(ranks: Ranks, size: int) -> None:
    texts = ranks.check(f"{CASES}:all_shared", size, backend="npu", **cards(size))
    assert len({text.splitlines()[-1] for text in texts}) == 1  # of `same_bits`


def test_a_group_can_be_opened_again(ranks: Ranks) -> None:
    ranks.check(f"{CASES}:opens_again", 2, backend="npu", **cards(2))


@pytest.mark.skipif(IS_REAL, reason="takes the minutes that HCCL waits")
@pytest.mark.parametrize(("case", "size"), [("nobody_comes", 1), ("sizes_differ", 2), ("one_leaves", 3)])
def test_nothing_waits_for_ever(ranks: Ranks, case: str, size: int) -> None:
    """By an error, where torch_npu is told not to end the process instead."""
    ranks.check(f"{CASES}:{case}", size, backend="npu", **cards(3, TORCH_HCCL_ASYNC_ERROR_HANDLING="0"))


def test_collectives(ranks: Ranks) -> None:
    ranks.check(f"{OWN}:together", 3, names=["reductions", "movements", "uneven", "subgroups"], **cards(3))


@pytest.mark.parametrize("order", ["", "1", "2"])
def test_streams_and_graphs(ranks: Ranks, order: str) -> None:
    ranks.check(f"{OWN}:together", 2, names=["streams", "graphs"], **cards(2, EMULATED_NPU_ORDER=order))


def test_devices_by_index(ranks: Ranks) -> None:
    ranks.check(f"{OWN}:devices_by_index", 2, env=cards(2)["env"])
