"""The capturer by itself: lengths that change between replays, errors, memory, streams, other threads."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from backends.metadata import AttentionMetadata, HostLengths
from backends.npu import OPS, plan
from backends.npu_graphs import NpuCapturer, NpuGraph
from npu_ops.recording import CAPTURE_LOCK, CaptureLock
from tests.emulated_npu.install import machine
from tests.npu.device import assert_near, npu
from tests.npu.engines import IS_REAL
from tests.ops.conftest import Paged

MEMORY: Any = SimpleNamespace(inputs={}, outputs={})  # the capturer needs none of it
HEADS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64}


@pytest.fixture
def capturer() -> Iterator[NpuCapturer]:
    torch.manual_seed(0)
    npu()
    made = NpuCapturer(npu().device)
    yield made
    npu().synchronize()
    gc.collect()


class Decode:
    """Attention of `num_layers` layers for four sequences, over static memory as a graph has it."""

    def __init__(self, num_layers: int = 3, window: int | None = None):
        self.window, device = window, npu().device
        self.cases = [Paged(ops=OPS, query_lens=[1] * 4, seq_lens=[300] * 4, num_heads=4, num_kv_heads=2, head_dim=64,
                            block_size=128) for _ in range(num_layers)]
        self.caches = [tuple(c.nan_to_num(0.0).half().to(device) for c in (case.k_cache, case.v_cache))
                       for case in self.cases]
        self.queries = torch.randn(num_layers, 4, 4, 64).half().to(device)
        self.out = torch.zeros(num_layers, 4, 256, dtype=torch.float16, device=device)
        table = self.cases[0].meta.block_table_SM.clamp(max=len(self.caches[0][0]) - 1)
        self.host = HostLengths(torch.arange(5, dtype=torch.int32).numpy(), torch.ones(4, dtype=torch.int32).numpy())
        self.meta = AttentionMetadata(
            query_start_S1=torch.arange(5, dtype=torch.int32, device=device), block_table_SM=table.to(device),
            seq_lens_S=torch.ones(4, dtype=torch.int32, device=device), host=self.host, max_query_len=1,
            slot_mapping_T=torch.zeros(4, dtype=torch.int32, device=device), max_seq_len=300, num_tokens=4,
            block_size=128)  # fmt: skip
        for case in self.cases:
            case.meta.block_table_SM = self.cases[0].meta.block_table_SM

    def prepare(self, seq_lens: list[int]) -> None:
        self.host.seq_lens_S[:] = seq_lens
        self.meta.plan = plan(self.meta, **HEADS)

    def __call__(self) -> None:
        for i, (k_cache, v_cache) in enumerate(self.caches):
            self.out[i] = OPS.attention(self.queries[i], k_cache, v_cache, self.meta, scale=0.125,
                                        sliding_window=self.window)  # fmt: skip

    def expected(self) -> Tensor:
        """By the same operator, eagerly."""
        found = torch.empty_like(self.out)
        self.out, kept = found, self.out
        self()
        self.out = kept
        return found.cpu()


def capture(capturer: NpuCapturer, program: Callable[[], None], pool: Any = None) -> NpuGraph:
    graph = capturer.capture(program, pool=capturer.make_pool() if pool is None else pool, memory=MEMORY)
    return graph


STEPS = [[1, 2, 128, 300], [129, 3, 1, 7], [300, 300, 300, 300], [1, 1, 1, 1], [2, 256, 257, 99]]


@pytest.mark.parametrize("window", [None, 40])
def test_each_replay_has_the_lengths_of_its_step(capturer: NpuCapturer, window: int | None) -> None:
    program = Decode(window=window)
    program.prepare([5, 5, 5, 5])
    graph = capture(capturer, program)
    for seq_lens in STEPS:
        program.prepare(seq_lens)
        program.out.fill_(float("nan"))
        graph.replay()
        found = program.out.cpu()
        assert torch.equal(found, program.expected())
        assert found.isfinite().all()
    assert not torch.equal(found[0], program.out[1].cpu())


@pytest.mark.parametrize("order", [None, "1", "2", "3"])
def test_two_sets_in_flight(capturer: NpuCapturer, order: str | None) -> None:
    """Step n + 1 is prepared and queued while n still runs; nothing waits but for a set's own fence. Also where the
    device runs everything as late as it may, its streams in any legal order."""
    pool, programs = capturer.make_pool(), [Decode(), Decode()]
    graphs, waits = [], [lambda: None, lambda: None]
    for program in programs:
        program.prepare([5, 5, 5, 5])
        graphs.append(capture(capturer, program, pool))
        graphs[-1].replay()
    events = [{id(task.event) for task in graph._recorder.tasks} for graph in graphs]
    assert events[0] == events[1]  # what makes the order of updates matter
    if order is not None and not IS_REAL:
        machine().set_order(order)
    found, expected = [], []
    for number, seq_lens in enumerate(STEPS * 2):
        turn = number % 2
        waits[turn]()
        program = programs[turn]
        program.prepare(seq_lens)
        graphs[turn].replay()
        found.append(program.out.clone())
        waits[turn] = capturer.fence()
    npu().synchronize()
    for number, seq_lens in enumerate(STEPS * 2):
        programs[number % 2].prepare(seq_lens)
        expected.append(programs[number % 2].expected())
    assert all(torch.equal(mine.cpu(), truth) for mine, truth in zip(found, expected))


def test_a_whole_step_is_what_it_is_without(capturer: NpuCapturer) -> None:
    """Writes into the cache, rotations and attention of two layers, which share what the step derives."""
    device, weight = npu().device, torch.randn(256, 512).half().to(npu().device) * 0.05
    program = Decode(num_layers=2)
    x = torch.randn(4, 256).half().to(device)
    cos_sin = torch.randn(400, 64).to(device)
    positions = torch.zeros(4, dtype=torch.int32, device=device)
    out = torch.zeros(4, 256, dtype=torch.float16, device=device)

    def step() -> None:
        y = x
        for k_cache, v_cache in program.caches:
            q = OPS.qkv_rope_write(y @ weight, positions, cos_sin, k_cache, v_cache, program.meta, **HEADS)
            y = OPS.attention(q, k_cache, v_cache, program.meta, scale=0.125)
        out.copy_(y)

    program.prepare([3, 3, 3, 3])
    graph = capture(capturer, step)
    for seq_lens in STEPS:
        program.prepare(seq_lens)
        lengths = torch.tensor(seq_lens, device=device)
        table = program.meta.block_table_SM
        positions.copy_(lengths - 1)
        places = table.gather(1, ((lengths - 1) // 128)[:, None]).squeeze(1) * 128 + (lengths - 1) % 128
        program.meta.slot_mapping_T.copy_(places)
        graph.replay()
        found = out.cpu()
        program.prepare(seq_lens)
        step()
        assert torch.equal(out.cpu(), found)


def test_a_function_that_looks_at_the_device_is_refused(capturer: NpuCapturer) -> None:
    """...and the capturer works on, in the same pool, whether there were graphs in it before or not."""
    program, pool, x = Decode(), capturer.make_pool(), torch.ones(3, device=npu().device)
    program.prepare([5, 5, 5, 5])
    ran = []

    def looks() -> None:
        program()
        if ran:  # at first it runs eagerly
            x.sum().item()
        ran.append(1)

    for _ in range(2):
        ran.clear()
        with pytest.raises(RuntimeError, match=r"107027|107030"):
            capture(capturer, looks, pool)
        for _ in range(2):
            program.prepare([5, 5, 5, 5])
            graph = capture(capturer, program, pool)
            program.prepare(STEPS[0])
            graph.replay()
            assert torch.equal(program.out.cpu(), program.expected())
        if ran:
            graph.release()


def test_any_error_of_the_function_is_passed_on(capturer: NpuCapturer) -> None:
    program, ran = Decode(), []

    def fails() -> None:
        program()
        ran.append(1)
        if len(ran) == 2:
            raise KeyError("mine")

    program.prepare([5, 5, 5, 5])
    with pytest.raises(KeyError, match="mine"):
        capture(capturer, fails)
    graph = capture(capturer, program)
    graph.replay()
    assert torch.equal(program.out.cpu(), program.expected())


def test_graphs_of_a_pool_share_memory(capturer: NpuCapturer) -> None:
    x = torch.ones(4 << 20, device=npu().device)
    out = torch.zeros_like(x)

    def step() -> None:
        out.copy_(x * 2 + 1)

    pool = capturer.make_pool()
    shared = [capture(capturer, step, pool) for _ in range(3)]
    alone = capture(capturer, step)
    assert shared[0].num_bytes >= 16 << 20 and alone.num_bytes >= 16 << 20
    assert sum(graph.num_bytes for graph in shared[1:]) < 8 << 20
    for graph in (*shared, alone):
        out.zero_()
        graph.replay()
        assert (out == 3).all()


def test_released_graphs_give_back_streams_and_memory(capturer: NpuCapturer) -> None:
    x = torch.ones(4 << 20, device=npu().device)
    pool, free = capturer.make_pool(), npu().available_memory_bytes()
    available = capturer._count_streams()
    for _ in range(3):
        graphs = [capture(capturer, lambda: x.add_(1), pool), capture(capturer, lambda: x.mul(2), pool)]
        assert capturer.num_streams == sum(graph.num_streams for graph in graphs) > 0
        assert capturer._count_streams() == available - capturer.num_streams
        for graph in graphs:
            graph.release()
        del graph, graphs
        gc.collect()
        torch.npu.empty_cache()
    assert capturer.num_streams == 0 and capturer._count_streams() == available
    assert npu().available_memory_bytes() >= free - (1 << 20)


def test_the_budget_of_streams_is_the_runtime_s(capturer: NpuCapturer) -> None:
    before = capturer.max_streams
    assert before is not None and before == capturer._count_streams() - 128
    graph = capture(capturer, lambda: torch.ones(3, device=npu().device).add_(1))
    assert capturer.max_streams == before  # what is left, and what the graphs hold
    graph.release()


def test_threads_that_copy_do_not_disturb_a_capture(capturer: NpuCapturer) -> None:
    """Synchronisation and pinned copies of any thread would break it."""
    cache = torch.randn(8, 128, 2, 64).half().to(npu().device)
    stored = npu().allocate_host(8 * npu().ops.stored_bytes((cache, cache), format="fp16")).view(8, -1)
    stop, failed, rounds = threading.Event(), [], [0, 0]

    def copies(part: int) -> None:
        ids = torch.tensor([part, part + 2])
        try:
            while not stop.is_set():
                npu().ops.export_blocks((cache, cache), ids, stored, ids, format="fp16")
                npu().synchronize_copies()
                npu().ops.import_blocks((cache, cache), ids, stored, ids, format="fp16")
                npu().synchronize_copies()
                rounds[part] += 1
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=copies, args=(part,)) for part in range(2)]
    program = Decode()
    for thread in threads:
        thread.start()
    try:
        for _ in range(4):
            program.prepare([5, 5, 5, 5])
            graph = capture(capturer, program)
            program.prepare(STEPS[0])
            graph.replay()
            assert torch.equal(program.out.cpu(), program.expected())
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failed, failed
    assert min(rounds) > 0


def test_the_lock_lets_many_use_and_one_capture() -> None:
    lock, log, inside = CaptureLock(), [], threading.Barrier(3, timeout=10)

    def uses() -> None:
        with lock.using(), lock.using():  # again, in the same thread
            inside.wait()  # all three are inside at once
            inside.wait()
            log.append("used")

    threads = [threading.Thread(target=uses) for _ in range(2)]
    for thread in threads:
        thread.start()

    def captures() -> None:
        with lock.capturing(), lock.using():  # the capturing thread itself may
            log.append("captured")

    with lock.using():
        inside.wait()
        late = threading.Thread(target=captures)
        late.start()
        late.join(0.05)
        assert late.is_alive() and not log
        inside.wait()
    for thread in (*threads, late):
        thread.join(10)
    assert log[-1] == "captured" and len(log) == 3
    with CAPTURE_LOCK.using():
        pass


def test_a_replay_whose_update_fails_goes_on(capturer: NpuCapturer) -> None:
    """The error is passed on, and the device does not wait for what will never come."""
    program = Decode()
    program.prepare([5, 5, 5, 5])
    graph = capture(capturer, program)
    program.meta.plan = SimpleNamespace(lengths=None)
    with pytest.raises(AttributeError):
        graph.replay()
    npu().synchronize()
    program.prepare(STEPS[1])
    graph.replay()
    assert torch.equal(program.out.cpu(), program.expected())
    assert_near(program.out, program.expected())
