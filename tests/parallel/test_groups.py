"""Groups of processes on the CPU, through gloo. On an NPU: tests/npu/test_collectives.py."""

from __future__ import annotations

import socket
import time

import pytest
import torch

from backends.cpu.cpu import CpuBackend
from backends.cuda import CudaBackend
from backends.npu import NpuBackend
from tests.parallel.ranks import Ranks
from xllm.errors import ConfigError
from xllm.parallel.groups import open_group

CASES = "tests.parallel.cases"


@pytest.mark.parametrize("size", [2, 3])
def test_exchanges(ranks: Ranks, size: int) -> None:
    texts = ranks.check(f"{CASES}:all_shared", size, backend="cpu")
    assert len({text.splitlines()[-1] for text in texts}) == 1  # of `same_bits`


def test_a_group_can_be_opened_again(ranks: Ranks) -> None:
    ranks.check(f"{CASES}:opens_again", 2, backend="cpu")


@pytest.mark.parametrize(("case", "size"), [("nobody_comes", 1), ("sizes_differ", 2), ("one_leaves", 3)])
def test_nothing_waits_for_ever(ranks: Ranks, case: str, size: int) -> None:
    ranks.check(f"{CASES}:{case}", size, backend="cpu")


def test_votes(ranks: Ranks) -> None:
    ranks.check(f"{CASES}:votes", 2, backend="cpu")


def test_tcp(ranks: Ranks) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks.check(f"{CASES}:all_shared", 2, backend="cpu", store=f"tcp://127.0.0.1:{port}")


def test_alone_nothing_is_done() -> None:
    group = open_group(CpuBackend(compiled=False), rank=0, size=1, store="", timeout_s=1.0)
    x = torch.ones(3)
    assert group.all_reduce(x) is x and group.all_gather(x) is x and not torch.distributed.is_initialized()
    group.close()


@pytest.mark.parametrize(("rank", "size", "store"), [(2, 2, "file:///x"), (-1, 2, "file:///x"), (0, 0, ""), (0, 2, "")])
def test_what_cannot_be_a_group(rank: int, size: int, store: str) -> None:
    with pytest.raises(ConfigError, match=r"rank|tcp://"):
        open_group(CpuBackend(compiled=False), rank=rank, size=size, store=store, timeout_s=1.0)


def test_a_rank_that_is_late_is_killed(ranks: Ranks) -> None:
    began = time.monotonic()
    assert ranks.run(f"{CASES}:hangs", 2, timeout_s=0.5)[1].code is None
    assert time.monotonic() - began < 20


def test_each_backend_names_its_collectives() -> None:
    assert (CpuBackend.collectives, CudaBackend.collectives, NpuBackend.collectives) == ("gloo", "nccl", "hccl")
