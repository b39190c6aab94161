"""What ranks do in the tests of groups: the same for each backend."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from backends import get_backend
from backends.backend import Backend
from backends.cpu.cpu import CpuBackend
from xllm.errors import ConfigError, WorkerError
from xllm.parallel.groups import Group, open_group

TIMEOUT_S = 30.0


def join(backend: str, rank: int, size: int, store: str, timeout_s: float = TIMEOUT_S) -> tuple[Backend, Group]:
    device = CpuBackend(compiled=False) if backend == "cpu" else get_backend(backend)
    return device, open_group(device, rank=rank, size=size, store=store, timeout_s=timeout_s)


def part(rank: int, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Whole numbers, whose sums are exact in any dtype."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(-16, 17, shape, generator=generator).to(dtype)


def exchanges(device: Backend, group: Group) -> None:
    """Sums and gathers over many steps, of the shapes that layers have."""
    for step in range(4):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            shape = (step + 1, 24)
            x = part(group.rank + 10 * step, *shape, dtype=dtype).to(device.device)
            parts = [part(each + 10 * step, *shape, dtype=dtype) for each in range(group.size)]
            gathered = group.all_gather(x)
            assert torch.equal(gathered.cpu(), torch.cat(parts, dim=-1)) and gathered.is_contiguous()
            total = group.all_reduce(x)
            assert total is x and torch.equal(total.cpu(), torch.stack(parts).sum(0))


def gathers_any_shape(device: Backend, group: Group) -> None:
    for shape in ((3,), (1, 5), (2, 3, 4), (0, 7)):
        x = part(group.rank, *shape).to(device.device)
        expected = torch.cat([part(each, *shape) for each in range(group.size)], dim=-1)
        assert torch.equal(group.all_gather(x).cpu(), expected)
    wide = part(group.rank, 4, 6).to(device.device)
    columns = group.all_gather(wide[:, 1:3])
    assert torch.equal(columns.cpu(), torch.cat([part(each, 4, 6)[:, 1:3] for each in range(group.size)], dim=-1))


def same_bits(device: Backend, group: Group) -> None:
    """Sums that are not exact are still the same on all ranks: what they decide must not differ."""
    torch.manual_seed(group.rank)
    total = group.all_reduce(torch.randn(1000).to(torch.bfloat16).to(device.device))
    print(total.cpu().view(torch.int16).double().mul(torch.arange(1000) + 1).sum().item())


def splits_a_product(device: Backend, group: Group) -> None:
    """The two products of a tensor-parallel layer: columns of one, rows of the next, one sum."""
    x, up, down = (part(i, *shape, dtype=torch.float32) for i, shape in enumerate(((5, 8), (12, 8), (8, 12))))
    share = 12 // group.size
    mine = slice(group.rank * share, (group.rank + 1) * share)
    hidden = torch.relu(x.to(device.device) @ up[mine].to(device.device).T)
    out = group.all_reduce(hidden @ down[:, mine].to(device.device).T)
    whole = torch.relu(x @ up.T)
    assert torch.equal(out.cpu(), whole @ down.T)
    assert torch.equal(group.all_gather(hidden).cpu(), whole)


SHARED = (exchanges, gathers_any_shape, splits_a_product, same_bits)


def all_shared(backend: str, rank: int, size: int, store: str) -> None:
    device, group = join(backend, rank, size, store)
    for case in SHARED:
        case(device, group)
    group.close()


def opens_again(backend: str, rank: int, size: int, store: str) -> None:
    for time_ in range(2):
        device, group = join(backend, rank, size, f"{store}-{time_}")
        assert group.all_reduce(torch.ones(1, device=device.device)).item() == size
        group.close()
        group.close()
        assert not dist.is_initialized()


def nobody_comes(backend: str, rank: int, size: int, store: str) -> None:
    """Only this rank: the others never start."""
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=r"ranks \[1\] of 2 did not come within 1 s"):
        join(backend, rank, size + 1, store, timeout_s=1.0)
    assert time.monotonic() - began < 20 and not dist.is_initialized()


def sizes_differ(backend: str, rank: int, size: int, store: str) -> None:
    with pytest.raises((ConfigError, RuntimeError), match=r"the sizes \[2, 3\]|ranks \[2\] of 3 did not come"):
        join(backend, rank, size + rank, store, timeout_s=1.0)
    assert not dist.is_initialized()


def one_leaves(backend: str, rank: int, size: int, store: str) -> None:
    """The last rank ends in the middle; the others get an error and need not wait for ever for it."""
    device, group = join(backend, rank, size, store)
    x = group.all_reduce(torch.ones(4, device=device.device))
    assert x.tolist() == [size] * 4
    if rank == size - 1:
        os._exit(0)
    began = time.monotonic()
    with pytest.raises(RuntimeError):
        group.all_reduce(x).tolist()
    assert time.monotonic() - began < 20


def votes(backend: str, rank: int, size: int, store: str) -> None:
    """Every rank hears all; no exchange is disturbed, not even one that has begun. Who votes on something else, or not
    at all, is named."""
    device, group = join(backend, rank, size, store, timeout_s=1.0)
    for topic in ("graph a", "graph b", "graph a"):
        assert group.vote(topic, f"{topic} {rank}") == [f"{topic} {each}" for each in range(size)]
    if rank == 0:  # the others are in the exchange
        time.sleep(0.2)
    assert group.all_reduce(torch.ones(1, device=device.device)).item() == size
    began = time.monotonic()
    with pytest.raises(WorkerError, match=rf"rank {1 - rank} has not voted on graph {'cd'[rank]} within 1 s"):
        group.vote(f"graph {'cd'[rank]}", "")
    assert time.monotonic() - began < 20
    group.close()


def hangs(rank: int, size: int, store: str) -> None:
    time.sleep(60 if rank else 0)
