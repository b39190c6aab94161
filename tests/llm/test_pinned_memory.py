"""Pinned host memory as a driver sees it: no range twice, none unmapped while it is registered, none left behind.

The driver is a table that answers as CUDA's does; the engines, their graphs and their KV tiers are real.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import mmap
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from backends.cpu.cpu import CpuBackend
from backends.cpu.memory import lazy_zeros
from backends.pinned_memory import PinnedMemory
from xllm import LLM, SamplingParams

ALREADY_REGISTERED, NOT_REGISTERED = 712, 713
PAGE = mmap.PAGESIZE
_LIBC = ctypes.CDLL(None, use_errno=True)


def is_mapped(address: int, num_bytes: int) -> bool:
    residency = (ctypes.c_ubyte * (num_bytes // PAGE))()
    return not _LIBC.mincore(ctypes.c_void_p(address), ctypes.c_size_t(num_bytes), residency)


class Table:
    """A `PinningDriver`. errors: what it has refused. queued: work that uses host memory is on its way."""

    def __init__(self) -> None:
        self.ranges: dict[int, int] = {}
        self.errors: list[int] = []
        self.num_registered = self.most = 0
        self.capturing = self.queued = self.broken = False
        self._lock = threading.RLock()

    def register(self, address: int, num_bytes: int) -> int:
        with self._lock:
            return self._register(address, num_bytes)

    def _register(self, address: int, num_bytes: int) -> int:
        self.check()
        first, last = address // PAGE * PAGE, -(-(address + num_bytes) // PAGE) * PAGE
        if any(first < begin + size and begin < last for begin, size in self.ranges.items()):
            self.errors.append(ALREADY_REGISTERED)
            return ALREADY_REGISTERED
        self.ranges[first] = last - first
        self.num_registered += 1
        self.most = max(self.most, len(self.ranges))
        return 0

    def unregister(self, address: int) -> int:
        with self._lock:
            return self._unregister(address)

    def _unregister(self, address: int) -> int:
        self.check()
        assert not self.queued, "a copy may still use it"
        if self.broken or self.ranges.pop(address, None) is None:
            self.errors.append(NOT_REGISTERED)
            return NOT_REGISTERED
        return 0

    def is_capturing(self) -> bool:
        return self.capturing

    def synchronize(self) -> None:
        assert not self.capturing, "waiting for the device ends a capture"
        self.queued = False

    def check(self) -> None:
        for address, num_bytes in self.ranges.items():
            assert is_mapped(address, num_bytes), "a registered range has been unmapped"


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Iterator[Table]:
    """All host memory of CPU backends is pinned by it; nothing is left of it at the end."""
    found = Table()
    memory = PinnedMemory(found)
    monkeypatch.setattr(CpuBackend, "allocate_host", lambda backend, num_bytes: memory.allocate(num_bytes))
    yield found
    gc.collect()
    memory.collect()
    assert not found.ranges and not found.errors and found.num_registered
    found.check()


def test_views_keep_it_and_the_last_one_gives_it_back(table: Table) -> None:
    memory = CpuBackend(compiled=False).allocate_host(3 * PAGE + 5)
    assert memory.shape == (3 * PAGE + 5,) and memory.dtype is torch.uint8 and not memory.data_ptr() % PAGE
    assert not memory.any() and list(table.ranges.values()) == [4 * PAGE]
    view, array = memory[PAGE : 2 * PAGE].view(torch.int64), memory[-5:].numpy()
    del memory
    view.fill_(7)
    assert len(table.ranges) == 1
    del view
    array[:] = 3
    assert len(table.ranges) == 1
    table.queued = True
    del array
    assert not table.ranges and not table.queued


def test_no_bytes_are_not_registered(table: Table) -> None:
    backend = CpuBackend(compiled=False)
    assert not len(backend.allocate_host(0)) and not table.ranges
    backend.allocate_host(1)


def test_what_ends_during_a_capture_is_given_back_after_it(table: Table) -> None:
    backend = CpuBackend(compiled=False)
    first = backend.allocate_host(PAGE)
    table.capturing = True
    del first
    second = backend.allocate_host(PAGE)
    assert len(table.ranges) == 2
    table.capturing = False
    del second
    assert not table.ranges


def test_what_the_driver_keeps_stays_mapped() -> None:
    """Its pages are the driver's until it lets go: another mapping must not get their address."""
    table = Table()
    memory = PinnedMemory(table).allocate(PAGE)
    address = memory.data_ptr()
    table.broken = True
    del memory
    assert table.errors == [NOT_REGISTERED] and table.ranges == {address: PAGE}
    table.check()


def test_a_refusal_is_told_and_leaves_nothing(table: Table) -> None:
    memory = PinnedMemory(table)
    kept = memory.allocate(PAGE)
    table.register = lambda address, num_bytes: 2  # type: ignore[method-assign]
    with pytest.raises(MemoryError, match="error 2"):
        memory.allocate(PAGE)
    del kept
    assert not table.ranges


def test_threads_drop_what_others_made(table: Table) -> None:
    backend = CpuBackend(compiled=False)

    def work(pieces: list[Tensor]) -> None:
        while pieces:
            pieces.pop()

    for _ in range(20):
        halves = [[backend.allocate_host(PAGE) for _ in range(8)] for _ in range(2)]
        threads = [threading.Thread(target=work, args=(half,)) for half in halves]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not table.ranges


def answers(llm: LLM) -> list[list[int]]:
    prompts = [{"prompt_token_ids": [11 * n + k for k in range(1, 40)]} for n in range(3)]
    done = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=6, ignore_eos=True), use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in done]


def make_llm(**settings: str) -> LLM:
    return LLM(graph_mode="checked", max_num_seqs=4, num_kv_blocks=64, max_model_len=256, **settings)


def test_one_engine_after_the_other(table: Table) -> None:
    found = []
    for _ in range(4):
        with make_llm(host_cache_size="1MiB") as llm:
            found.append(answers(llm))
            assert table.ranges
        del llm
        gc.collect()
        assert not table.ranges, "an engine that is closed has let go of its memory"
    assert found == [found[0]] * 4


def test_two_engines_at_once_that_sleep_and_wake(table: Table) -> None:
    with make_llm() as first, make_llm() as second:
        right = answers(first)
        for level in (1, 2):
            for llm in (first, second):
                llm._core.control.sleep(level)
            for llm in (second, first):
                llm._core.control.wake_up()
            assert answers(first) == answers(second) == right
    assert table.most > 4


def test_buffers_that_grow(table: Table) -> None:
    """The bundle's own, which are replaced when more is asked for, and by those of the next section."""
    from benchmarks.gpu.bank import Bank
    from benchmarks.gpu.device import Device
    from benchmarks.gpu.op_cases import World

    for _ in range(3):
        for owner in (Bank(Device("cpu")), World(Device("cpu"), cases=1, longest=8, seed=0)):
            for num_bytes in (10, PAGE, PAGE + 1, 40 * PAGE, 3):
                assert len(owner.host_memory(num_bytes)) == num_bytes
    gc.collect()


@contextlib.contextmanager
def refusal() -> Iterator[None]:
    with pytest.raises((MemoryError, AssertionError)):
        yield


def test_the_table_notices_memory_that_stays_registered() -> None:
    """Otherwise the tests above prove little: memory that goes back to the system as it is, and comes again."""
    table = Table()
    with refusal():
        for _ in range(50):
            memory = lazy_zeros((40 * PAGE,), torch.uint8)
            if table.register(memory.data_ptr(), len(memory)):
                raise MemoryError
            del memory
