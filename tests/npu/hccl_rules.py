"""What ranks do in test_emulator_collectives.py: each function shows that a rule of the emulated HCCL bites."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.npu import hccl_calls as hccl
from tests.npu.collective_cases import start
from tests.npu.hccl_calls import Comm, library

Op = dist.ReduceOp


def one() -> Comm:
    """A communicator of this process alone."""
    torch.npu.set_device(0)
    torch.ones(1, device="npu")
    made = Comm()
    assert made.code == 0
    return made


def fails_with(code: int) -> Any:
    return pytest.raises(RuntimeError, match=str(code))


def arguments(rank: int, size: int, store: str) -> None:
    comm, x = one(), torch.ones(1000, device="npu")
    assert comm.all_reduce(x) == 0 and x.sum().item() == 1000
    for code, given in [
        (hccl.PTR, {"send": None}),
        (hccl.PTR, {"receive": None}),
        (hccl.PTR, {"comm": None}),
        (hccl.PARA, {"send": torch.ones(1000).data_ptr()}),  # host memory
        (hccl.PARA, {"count": 1 << 30}),
        (hccl.PARA, {"op": 4}),
        (hccl.PARA, {"stream": None}),
        (hccl.PARA, {"stream": 64}),
        (hccl.NOT_SUPPORT, {"type": hccl.UINT8}),
        (hccl.NOT_SUPPORT, {"type": hccl.FP64}),
        (hccl.NOT_SUPPORT, {"type": 13}),
        (hccl.NOT_SUPPORT, {"type": hccl.BF16, "op": hccl.PROD}),
    ]:
        assert comm.all_reduce(x, **given) == code, given
    stream = hccl.current_stream()
    assert library().HcclBroadcast(x.data_ptr(), 4, hccl.FP32, 1, comm.handle, stream) == hccl.PARA  # no such root
    assert library().HcclSend(x.data_ptr(), 4, hccl.FP32, 0, comm.handle, stream) == hccl.PARA  # to itself
    assert library().HcclAllGather(x.data_ptr(), x.data_ptr(), 4, 13, comm.handle, stream) == hccl.NOT_SUPPORT
    assert comm.destroy() == 0
    assert comm.destroy() == hccl.PARA and comm.all_reduce(x) == hccl.PARA
    assert library().HcclCommDestroy(None) == hccl.PTR
    torch.npu.synchronize()


def devices(rank: int, size: int, store: str) -> None:
    """The thread, the stream and the communicator are of one device."""
    comm, x = one(), torch.ones(4, device="npu:0")
    stream = hccl.current_stream()
    torch.npu.set_device(1)
    torch.ones(1, device="npu:1")
    assert comm.all_reduce(x, stream=stream) == hccl.PARA
    other = hccl.current_stream()
    torch.npu.set_device(0)
    assert comm.all_reduce(x, stream=other) == hccl.PARA
    assert comm.all_reduce(x, stream=stream) == 0


def visible_devices(rank: int, size: int, store: str) -> None:
    acl, count = ctypes.CDLL("libascendcl.so"), ctypes.c_uint32()
    for listed, expected in [("", 4), ("2", 1), ("3,1", 2), ("0,9,1", 1), ("7", 0), ("1,x", 1)]:
        os.environ["ASCEND_RT_VISIBLE_DEVICES"] = listed
        assert acl.aclrtGetDeviceCount(ctypes.byref(count)) == 0 and count.value == expected, listed


def openings(rank: int, size: int, store: str) -> None:
    torch.npu.set_device(0)
    torch.ones(1, device="npu")
    assert Comm(0).code == Comm(2, 2).code == Comm(17).code == hccl.PARA
    assert Comm(1, 0, ctypes.create_string_buffer(b"anything", hccl.ROOT_INFO_BYTES)).code == hccl.TCP_CONNECT
    began = time.monotonic()
    assert Comm(2, 0).code == hccl.TIMEOUT and 0.9 < time.monotonic() - began < 20  # nobody else comes
    made, config = ctypes.c_void_p(), ctypes.create_string_buffer(4096)
    init = library().HcclCommInitRootInfoConfig
    assert init(1, hccl.root_info(), 0, config, ctypes.byref(made)) == hccl.PARA  # not initialised
    assert init(1, hccl.root_info(), 0, None, ctypes.byref(made)) == hccl.PTR
    assert library().HcclCommInitRootInfo(1, None, 0, ctypes.byref(made)) == hccl.PTR


def memory(rank: int, size: int, store: str) -> None:
    """A communicator takes two buffers of HCCL_BUFFSIZE, which must be there."""
    torch.npu.set_device(0)
    torch.ones(1, device="npu")
    before = torch.npu.mem_get_info()[0]
    first = Comm()
    assert first.code == 0 and before - torch.npu.mem_get_info()[0] == 2 * 100 << 20
    assert Comm().code == hccl.OOM
    assert first.destroy() == 0 and torch.npu.mem_get_info()[0] == before
    assert Comm().code == 0


@contextmanager
def capturing() -> Iterator[torch.npu.NPUGraph]:
    graph = torch.npu.NPUGraph()
    torch.npu.synchronize()
    with torch.npu.graph(graph):
        yield graph


def captures(rank: int, size: int, store: str) -> None:
    """Nothing runs in a capture, and a communicator cannot be made in one; a replay needs all that it was made of."""
    comm, x = one(), torch.ones(4, device="npu")
    out = torch.zeros(4, device="npu")
    with capturing() as graph:
        assert comm.all_reduce(x, out) == 0
    assert out.tolist() == [0.0] * 4
    graph.replay()
    assert out.tolist() == [1.0] * 4
    code = 0
    before = torch.npu.current_stream()
    with pytest.raises(RuntimeError), capturing():
        code = Comm().code
    assert code == hccl.RUNTIME
    torch.npu.set_stream(before)  # where a capture fails, torch_npu leaves its stream current
    comm.destroy()
    graph.replay()
    with fails_with(507011):
        torch.npu.synchronize()


def task_groups(rank: int, size: int, store: str, fails: dict[str, bool]) -> None:
    """Where collectives may stand in a capture that has task groups, by the place: none within, and with AIV none at
    all behind one."""
    x = torch.ones(4, device="npu")
    for place, wrong in fails.items():
        comm, before, code = one(), torch.npu.current_stream(), None
        with suppress(RuntimeError), capturing() as graph:
            stream = torch.npu.current_stream()
            if place == "before":
                code = comm.all_reduce(x)
            torch.npu.graph_task_group_begin(stream)
            y = x + 1
            if place == "within":
                code = comm.all_reduce(x)
            torch.npu.graph_task_group_end(stream)
            if place == "behind":
                code = comm.all_reduce(x)
            z = y + 1
        torch.npu.set_stream(before)
        assert code == (hccl.RUNTIME if wrong else 0) and z.numel() == 4, place
        if not wrong:
            graph.replay()
            torch.npu.synchronize()
            assert x.tolist() == [1.0] * 4
        comm.destroy()


def task_group_error(rank: int, size: int, store: str) -> None:
    """As torch_npu words it, and the capture is lost."""
    start(rank, size, store)
    x = torch.ones(4, device="npu")
    dist.all_reduce(x)

    def capture() -> None:
        with capturing():
            torch.npu.graph_task_group_begin(torch.npu.current_stream())
            with fails_with(507009):
                dist.all_reduce(x)
            torch.npu.graph_task_group_end(torch.npu.current_stream())

    with fails_with(hccl.CAPTURE_INVALIDATED):
        capture()


def queued(rank: int, size: int, store: str) -> None:
    """It is done when the stream comes to it, not when it is called."""
    from tests.emulated_npu.install import machine

    comm, x, out = one(), torch.ones(4, device="npu"), torch.zeros(4, device="npu")
    torch.npu.synchronize()
    machine().set_order("3")
    from tests.emulated_npu.tensors import host

    assert comm.all_reduce(x, out) == 0
    assert host(out).tolist() == [0.0] * 4
    torch.npu.synchronize()
    assert host(out).tolist() == [1.0] * 4
    assert comm.all_reduce(x, out) == 0
    comm.destroy()
    with fails_with(507011):
        torch.npu.synchronize()


def two_at_once(rank: int, size: int, store: str) -> None:
    """Operations of one communicator are ordered by the caller; by luck only is an error."""
    from tests.emulated_npu.install import machine

    side, found = torch.npu.Stream(), {True: set(), False: set()}
    for waits in found:
        for seed in range(12):
            comm, x = one(), torch.ones(4, device="npu")
            torch.npu.synchronize()
            machine().set_order(str(seed))
            comm.all_reduce(x)
            if waits:
                side.wait_stream(torch.npu.current_stream())
            with torch.npu.stream(side):
                comm.all_reduce(x)
            good = False
            with suppress(RuntimeError):
                torch.npu.synchronize()
                good = True
            assert comm.all_reduce(x) == comm.async_error() == (0 if good else hccl.REMOTE)
            found[waits].add(comm.async_error())
            machine().drop_all()
            comm.destroy()
    assert found == {True: {0}, False: {0, hccl.REMOTE}}, found


def runs_beside(rank: int, size: int, store: str) -> None:
    """A stream whose last task another thread runs is not idle: what is called meanwhile comes after it."""
    from tests.emulated_npu.install import machine
    from tests.emulated_npu.tasks import Kernel, Lane

    comm, began, stream = one(), threading.Event(), hccl.current_stream()
    running, seen = machine(), []

    def slow() -> None:
        began.set()
        time.sleep(0.2)
        seen.append("slow")

    with running.changed:
        running.streams.setdefault(stream, Lane("a stream")).tasks.append(Kernel("slow", slow))
    assert began.wait(10) and not running.is_plain(stream)
    running.submit(stream, Kernel("next", lambda: seen.append("next")))
    torch.npu.synchronize()
    assert seen == ["slow", "next"] and running.is_plain(stream) and comm.destroy() == 0


def late(rank: int, size: int, store: str) -> None:
    """A device goes on while its process waits for something else: here for the other rank, through a file."""
    start(rank, size, store)
    files = dist.FileStore(store.removeprefix("file://") + ".files", size)
    x = torch.ones(4, device="npu")
    dist.all_reduce(x)
    if rank == 0:
        files.wait(["done"])
    else:
        assert x.tolist() == [2.0] * 4
        files.set("done", "yes")
    assert x.tolist() == [2.0] * 4
    dist.destroy_process_group()


def same_device(rank: int, size: int, store: str) -> None:
    assert Comm.of_store(store, size, rank).code == hccl.PARA


def rounding(rank: int, size: int, store: str) -> None:
    """Each step of a reduction is rounded to the type; every number of 16 bits is among them."""
    comm = Comm.of_store(store, size, rank)
    assert comm.code == 0
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    other = bits[torch.randperm(len(bits), generator=torch.Generator().manual_seed(1))]
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        pair = [each.view(dtype) if dtype.itemsize == 2 else each.float() / 7 for each in (bits, other)]
        expected = {hccl.SUM: pair[0] + pair[1], hccl.MAX: torch.maximum(*pair), hccl.MIN: torch.minimum(*pair)}
        if dtype is not torch.bfloat16:
            expected[hccl.PROD] = pair[0] * pair[1]
        for op, right in expected.items():
            x = pair[rank].to("npu")
            assert comm.all_reduce(x, op=op) == 0
            assert torch.equal(x.cpu().nan_to_num(1e4), right.nan_to_num(1e4)), (dtype, op)
    comm.destroy()


def _differ(how: str, rank: int, group: dist.ProcessGroup) -> None:
    x, other = torch.ones(8, device="npu"), rank == 1
    if how == "count":
        dist.all_reduce(x[:4] if other else x, group=group)
    elif how == "dtype":
        dist.all_reduce(x.to(torch.int32) if other else x, group=group)
    elif how == "op":
        dist.all_reduce(x, Op.MAX if other else Op.SUM, group=group)
    elif how == "root":
        dist.broadcast(x, rank, group=group)
    elif how == "operation":
        dist.broadcast(x, 0, group=group) if other else dist.all_reduce(x, group=group)
    elif how == "pieces":
        counts = [4, 4] if other else [5, 3]
        dist.all_to_all_single(torch.empty_like(x), x, counts, counts[::-1], group=group)
    elif how == "two senders":
        dist.send(x, 1 - rank, group=group)
    elif how == "a pair's count":
        dist.recv(x[:4], 0, group=group) if other else dist.send(x, 1, group=group)
    torch.npu.synchronize()


def ranks_differ(rank: int, size: int, store: str) -> None:
    """All ranks are told, at once; the communicator is of no use any more, others are."""
    start(rank, size, store)
    for how in ("count", "dtype", "op", "root", "operation", "pieces", "two senders", "a pair's count"):
        group = dist.new_group([0, 1])
        began = time.monotonic()
        with fails_with(507048):
            _differ(how, rank, group)
        assert time.monotonic() - began < 15, how
    x = torch.ones(4, device="npu")
    dist.all_reduce(x)
    assert x.tolist() == [2.0] * 4


def peer_leaves(rank: int, size: int, store: str, how: str) -> None:
    """Rank 1 is gone; rank 0 has an error in bounded time, and ends with 3, or torch_npu ends it."""
    start(rank, size, store)
    x = torch.ones(8, device="npu")
    dist.all_reduce(x)
    assert x.tolist() == [2.0] * 8
    files = dist.FileStore(store.removeprefix("file://") + ".files", size)
    if rank == 1:
        if how == "dies":
            os._exit(7)
        if how == "destroys":
            dist.destroy_process_group()
        with suppress(RuntimeError):  # how == "sleeps": longer than HCCL_EXEC_TIMEOUT
            files.wait(["seen"], timedelta(seconds=20))
        os._exit(7)
    began = time.monotonic()
    try:
        dist.all_reduce(x)
        torch.npu.synchronize()
    except RuntimeError as error:
        print(f"after {time.monotonic() - began:.1f} s: {error}", flush=True)
        files.set("seen", "yes")
        sys.exit(3)
