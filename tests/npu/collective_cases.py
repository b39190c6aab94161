"""What ranks do in test_collectives.py: the collectives of torch_npu's ProcessGroupHCCL, on streams and in graphs."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

Op = dist.ReduceOp
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
INTS = (torch.int8, torch.int32, torch.int64)


def start(rank: int, size: int, store: str, *, device: int = 0, timeout_s: float = 40.0) -> None:
    torch.npu.set_device(device)
    dist.init_process_group("hccl", init_method=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout_s))


def values(rank: int, *shape: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(100 + rank)
    return torch.randint(0 if dtype is torch.uint8 else -3, 4, shape, generator=generator).to(dtype)


def npu(x: Tensor) -> Tensor:
    return x.to("npu")


def reductions(rank: int, size: int) -> None:
    folds: dict[Any, Callable[[Tensor], Tensor]] = {
        Op.SUM: lambda x: x.sum(0),
        Op.MAX: lambda x: x.amax(0),
        Op.MIN: lambda x: x.amin(0),
        Op.PRODUCT: lambda x: x.prod(0),
    }
    for dtype in FLOATS + INTS:
        all_values = torch.stack([values(each, 5, 7, dtype=dtype) for each in range(size)])
        for op, fold in folds.items():
            x = npu(all_values[rank])
            if op is Op.PRODUCT and dtype is torch.bfloat16:
                with pytest.raises(RuntimeError):
                    dist.all_reduce(x, op)
                continue
            expected = fold(all_values.double()).to(dtype)
            dist.all_reduce(x, op)
            assert torch.equal(x.cpu(), expected), (dtype, op)
            x = npu(all_values[rank])
            dist.reduce(x, size - 1, op)
            assert rank != size - 1 or torch.equal(x.cpu(), expected)
            pieces = npu(all_values[rank].flatten()[: size * 11])
            mine = torch.empty(11, dtype=dtype, device="npu")
            dist.reduce_scatter_tensor(mine, pieces, op)
            assert torch.equal(mine.cpu(), expected.flatten()[rank * 11 : rank * 11 + 11])


def movements(rank: int, size: int) -> None:
    """Lists of tensors in pieces of 512 bytes: torch_npu pads others by an operator of its C++ that is not emulated."""
    for dtype in FLOATS + INTS + (torch.uint8, torch.float64):
        every = [values(each, size * 2, 256, dtype=dtype) for each in range(size)]
        x = npu(every[rank])
        parts = [torch.empty_like(x) for _ in every]
        dist.all_gather(parts, x)
        assert all(torch.equal(part.cpu(), right) for part, right in zip(parts, every, strict=True)), dtype
        dist.broadcast(x, 1)
        assert torch.equal(x.cpu(), every[1])
        x = npu(every[rank])
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x)
        assert torch.equal(out.cpu(), torch.cat([each[rank * 2 : rank * 2 + 2] for each in every]))
        piece = torch.empty(2, 256, dtype=dtype, device="npu")
        dist.scatter(piece, list(x.split(2)) if rank == 2 else None, 2)
        assert torch.equal(piece.cpu(), every[2][rank * 2 : rank * 2 + 2])
        if rank == 0:
            dist.send(x, 1)
        elif rank == 1:
            dist.recv(out, 0)
            assert torch.equal(out.cpu(), every[0])


def uneven(rank: int, size: int) -> None:
    """Pieces of other sizes for each rank, and none at all."""
    numbers = [torch.arange(each * 2 + 1) + 100 * each for each in range(size)]
    parts = [torch.empty_like(npu(each)) for each in numbers]
    dist.all_gather(parts, npu(numbers[rank]))
    assert [part.tolist() for part in parts] == [each.tolist() for each in numbers]
    sends = [(rank + to) % size for to in range(size)]  # to each; the sum of ranks decides how many
    sent = torch.cat([torch.full((count,), rank * 10 + to) for to, count in enumerate(sends)])
    counts = [(each + rank) % size for each in range(size)]
    out = torch.empty(sum(counts), dtype=torch.int64, device="npu")
    dist.all_to_all_single(out, npu(sent), counts, sends)
    expected = [each * 10 + rank for each, count in enumerate(counts) for _ in range(count)]
    assert out.tolist() == expected
    dist.barrier()


def subgroups(rank: int, size: int) -> None:
    """Groups of some ranks, used in turn with the whole."""
    pairs = [dist.new_group([first, second]) for first, second in ((0, 1), (1, 2), (0, 2))]
    for _ in range(3):
        for group, members in zip(pairs, ((0, 1), (1, 2), (0, 2)), strict=True):
            if rank in members:
                x = npu(torch.tensor([2.0**rank]))
                dist.all_reduce(x, group=group)
                assert x.item() == sum(2.0**each for each in members)
        x = npu(torch.tensor([2.0**rank]))
        dist.all_reduce(x)
        assert x.item() == 2.0**size - 1


def devices_by_index(rank: int, size: int, store: str) -> None:
    """All processes see all cards, and each uses the one of its number."""
    start(rank, size, store, device=rank)
    x = torch.full((3,), float(rank + 1), device=f"npu:{rank}")
    dist.all_reduce(x)
    assert x.device.index == rank and x.tolist() == [size * (size + 1) / 2] * 3
    dist.destroy_process_group()


def streams(rank: int, size: int) -> None:
    """What is queued before an exchange comes before it, and what follows it after; also on another stream."""
    side = torch.npu.Stream()
    for step in range(6):
        x = torch.zeros(64, device="npu")
        x += rank + step
        work = dist.all_reduce(x, async_op=True)
        y = torch.ones(64, device="npu") * 2  # meanwhile
        work.wait()
        z = x * y
        side.wait_stream(torch.npu.current_stream())
        with torch.npu.stream(side):
            dist.all_reduce(z)
            w = z + 1
        torch.npu.current_stream().wait_stream(side)
        expected = (sum(range(size)) + size * step) * 2 * size + 1
        assert (w * 1).tolist() == [expected] * 64


def graphs(rank: int, size: int) -> None:
    """A capture runs nothing; each replay exchanges what is there then, also between eager exchanges."""
    x, out = torch.zeros(4, device="npu"), torch.zeros(4, device="npu")
    gathered = torch.zeros(4 * size, device="npu")
    dist.all_reduce(x.clone())  # communicators are made outside of captures
    graph = torch.npu.NPUGraph()
    torch.npu.synchronize()
    with torch.npu.graph(graph):
        y = x * 2
        dist.all_reduce(y)
        out.copy_(y + 1)
        dist.all_gather_single(gathered, out + rank)
    assert out.tolist() == [0.0] * 4
    for step in range(5):
        x.fill_(rank + step)
        graph.replay()
        expected = 2 * (sum(range(size)) + size * step) + 1
        if step % 2:
            eager = out.clone()
            dist.all_reduce(eager)
            assert eager.tolist() == [expected * size] * 4
        assert out.tolist() == [expected] * 4
        assert gathered.tolist() == [expected + each for each in range(size) for _ in range(4)]
    graph.reset()


CASES: dict[str, Callable[[int, int], None]] = {
    each.__name__: each for each in (reductions, movements, uneven, subgroups, streams, graphs)
}


def together(rank: int, size: int, store: str, names: list[str]) -> None:
    """One after the other, on one group."""
    start(rank, size, store)
    for name in names:
        CASES[name](rank, size)
    dist.destroy_process_group()
