"""Memory of the emulated device: its limit, virtual memory, copies, streams as a resource; each argument is checked."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch_npu

from tests.emulated_npu import environment
from tests.emulated_npu.runtime import library
from tests.npu.test_emulator_capture import DEVICE, captured

MIB = 1 << 20
PAGE = 2 * MIB
INVALID, NO_MEMORY, NO_STREAMS = 107000, 207001, 207008
Pointer = ctypes.c_void_p


class Location(ctypes.Structure):
    _fields_ = [("id", ctypes.c_uint32), ("type", ctypes.c_int)]


class Property(ctypes.Structure):
    _fields_ = [
        ("handle_type", ctypes.c_int),
        ("allocation_type", ctypes.c_int),
        ("attribute", ctypes.c_int),
        ("location", Location),
        ("reserve", ctypes.c_uint64),
    ]


def device_property(**changed: Any) -> Property:
    made = Property(0, 0, 4, Location(0, 1), 0)
    for name, value in changed.items():
        setattr(made, name, value)
    return made


def call(name: str, *arguments: Any) -> int:
    return int(getattr(library(), name)(*arguments))


def size(number: int) -> ctypes.c_size_t:
    return ctypes.c_size_t(number)


class Pages:
    """Four pages of addresses and two of memory."""

    def __init__(self) -> None:
        self.start, self.handles = Pointer(), [Pointer(), Pointer()]
        assert (
            call("aclrtReserveMemAddress", ctypes.byref(self.start), size(4 * PAGE), size(0), None, ctypes.c_uint64(0))
            == 0
        )
        for handle in self.handles:
            assert self.create(handle) == 0
        self.mapped: set[int] = set()

    def create(self, handle: Pointer, num_bytes: int = PAGE, given: Property | None = None, flags: int = 0) -> int:
        prop = given or device_property()
        return call(
            "aclrtMallocPhysical", ctypes.byref(handle), size(num_bytes), ctypes.byref(prop), ctypes.c_uint64(flags)
        )

    def at(self, page: int) -> int:
        assert self.start.value is not None
        return self.start.value + page * PAGE

    def map(
        self, page: int, handle: int, *, num_bytes: int = PAGE, offset: int = 0, flags: int = 0, shift: int = 0
    ) -> int:
        code = call(
            "aclrtMapMem",
            Pointer(self.at(page) + shift),
            size(num_bytes),
            size(offset),
            self.handles[handle],
            ctypes.c_uint64(flags),
        )
        self.mapped |= set() if code else {page}
        return code

    def unmap(self, page: int, shift: int = 0) -> int:
        code = call("aclrtUnmapMem", Pointer(self.at(page) + shift))
        self.mapped -= set() if code else {page}
        return code

    def tensor(self) -> torch.Tensor:
        storage = torch_npu._C._construct_storage_from_data_pointer(self.at(0), DEVICE, 4 * PAGE)
        metadata = {
            "size": torch.Size([4, PAGE // 4]), "stride": (PAGE // 4, 1), "dtype": torch.float32, "device": DEVICE,
            "storage_offset": 0,
        }  # fmt: skip
        return torch_npu._C._construct_NPU_Tensor_From_Storage_And_Metadata(metadata, storage)

    def close(self) -> None:
        for page in sorted(self.mapped):
            assert self.unmap(page) == 0
        for handle in self.handles:
            assert call("aclrtFreePhysical", handle) == 0
        assert call("aclrtReleaseMemAddress", self.start) == 0


@pytest.fixture
def pages() -> Iterator[Pages]:
    torch.npu.set_device(0)
    made = Pages()
    yield made
    made.close()


def test_one_page_at_two_addresses(pages: Pages) -> None:
    assert pages.map(0, 0) == 0 and pages.map(2, 0) == 0 and pages.map(1, 1) == 0
    x = pages.tensor()
    assert x.data_ptr() == pages.at(0)
    x[0] = 5.0
    x[1] = 7.0
    assert x[2, -1].item() == 5.0 and x[1].mean().item() == 7.0
    assert pages.unmap(0) == 0
    x[2, 0] = 6.0
    assert pages.map(3, 0) == 0 and x[3, 0].item() == 6.0


@pytest.mark.parametrize(
    "mistake",
    [
        pytest.param(lambda p: p.map(0, 0, offset=PAGE), id="map_offset"),
        pytest.param(lambda p: p.map(0, 0, flags=1), id="map_flags"),
        pytest.param(lambda p: p.map(0, 0, num_bytes=PAGE // 2), id="map_part"),
        pytest.param(lambda p: p.map(0, 0, shift=4096), id="map_between_pages"),
        pytest.param(lambda p: p.map(4, 0), id="map_outside"),
        pytest.param(lambda p: p.map(0, 0) or p.map(0, 1), id="map_twice"),
        pytest.param(lambda p: p.unmap(0), id="unmap_nothing"),
        pytest.param(lambda p: p.map(0, 0) or p.unmap(0, 4096), id="unmap_between_pages"),
        pytest.param(lambda p: p.map(0, 0) or call("aclrtFreePhysical", p.handles[0]), id="free_mapped"),
        pytest.param(lambda p: p.map(0, 0) or call("aclrtReleaseMemAddress", p.start), id="release_mapped"),
        pytest.param(lambda p: call("aclrtReleaseMemAddress", Pointer(p.at(1))), id="release_middle"),
        pytest.param(lambda p: p.create(Pointer(), PAGE + 4096), id="physical_size"),
        pytest.param(lambda p: p.create(Pointer(), flags=1), id="physical_flags"),
        pytest.param(lambda p: p.create(Pointer(), given=device_property(attribute=1)), id="not_huge"),
        pytest.param(lambda p: p.create(Pointer(), given=device_property(attribute=10)), id="not_a_gigabyte"),
        pytest.param(lambda p: p.create(Pointer(), given=device_property(location=Location(0, 0))), id="host_memory"),
        pytest.param(
            lambda p: p.create(Pointer(), given=device_property(location=Location(5, 1))), id="no_such_device"
        ),
        pytest.param(lambda p: p.create(Pointer(), given=device_property(reserve=1)), id="reserved_field"),
        pytest.param(lambda p: reserve(0, 0), id="reserve_nothing"),
        pytest.param(lambda p: reserve(PAGE, 4096), id="reserve_alignment"),
    ],
)
def test_mistakes_with_virtual_memory(pages: Pages, mistake: Callable[[Pages], int]) -> None:
    assert mistake(pages) == INVALID


def reserve(num_bytes: int, alignment: int) -> int:
    return call(
        "aclrtReserveMemAddress", ctypes.byref(Pointer()), size(num_bytes), size(alignment), None, ctypes.c_uint64(0)
    )


def test_unmapping_under_queued_work(pages: Pages) -> None:
    from tests.emulated_npu.install import machine

    assert pages.map(0, 0) == 0
    x = pages.tensor()[0]
    machine().set_order("0")
    x.add_(1)
    assert pages.unmap(0) == 507015
    machine().drop_all()
    machine().set_order(None)
    assert pages.map(0, 0) == 0
    x.add_(1)
    torch.npu.synchronize()
    assert pages.unmap(0) == 0


def test_physical_memory_counts(monkeypatch: pytest.MonkeyPatch, pages: Pages) -> None:
    free, _ = torch.npu.mem_get_info()
    handle = Pointer()
    assert pages.create(handle, 4 * PAGE) == 0
    assert free - torch.npu.mem_get_info()[0] == 4 * PAGE
    limit_to(monkeypatch, PAGE)
    assert pages.create(Pointer(), 2 * PAGE) == NO_MEMORY
    assert call("aclrtFreePhysical", handle) == 0


def limit_to(monkeypatch: pytest.MonkeyPatch, more_bytes: int) -> None:
    monkeypatch.setenv("EMULATED_NPU_HBM_BYTES", str(library().emulated_npu_used_bytes() + more_bytes))


def test_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.npu.empty_cache()
    limit_to(monkeypatch, 64 * MIB)
    assert torch.npu.mem_get_info()[0] == 64 * MIB
    x = torch.zeros(40 * MIB, dtype=torch.uint8, device=DEVICE)
    with pytest.raises(torch.OutOfMemoryError):
        torch.zeros(40 * MIB, dtype=torch.uint8, device=DEVICE)
    del x
    assert torch.zeros(40 * MIB, dtype=torch.uint8, device=DEVICE).sum().item() == 0  # the cached block is reused
    torch.npu.empty_cache()
    assert torch.npu.mem_get_info()[0] == 64 * MIB


def test_freeing_twice() -> None:
    pointer = Pointer()
    assert call("aclrtMalloc", ctypes.byref(pointer), size(4096), 0) == 0
    assert call("aclrtFree", pointer) == 0
    assert call("aclrtFree", pointer) == INVALID


def test_copies_are_checked() -> None:
    device, memory = Pointer(), (ctypes.c_char * 8192)()
    assert call("aclrtMalloc", ctypes.byref(device), size(PAGE), 0) == 0

    def copy(to: Any, most: int, source: Any, count: int, kind: int) -> int:
        return call("aclrtMemcpy", to, size(most), source, size(count), kind)

    assert copy(device, PAGE, memory, 8192, 1) == 0 and copy(memory, 8192, device, 8192, 2) == 0
    assert copy(device, PAGE, memory, 8192, 2) == INVALID  # the other way round
    assert copy(device, 4096, memory, 8192, 1) == INVALID  # more than there is room for
    assert copy(Pointer(device.value + PAGE - 4096), 8192, memory, 8192, 1) == INVALID  # type: ignore[operator]
    assert call("aclrtFree", device) == 0
    assert copy(device, PAGE, memory, 8192, 1) == INVALID


def available() -> int:
    number = ctypes.c_uint32()
    assert call("aclrtGetStreamAvailableNum", ctypes.byref(number)) == 0
    return number.value


def test_a_graph_costs_a_stream() -> None:
    x = torch.ones(4, device=DEVICE)
    before = available()
    graph, _ = captured(lambda: x + 1)
    assert available() <= before - 1
    left = available()
    other, _ = captured(lambda: x + 1)
    assert available() == left - 1
    other.reset()
    assert available() == left
    graph.reset()


def test_streams_run_out(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(4, device=DEVICE)
    warm, _ = captured(lambda: x + 1)
    taken = 2048 - available()
    monkeypatch.setenv("EMULATED_NPU_STREAMS", str(taken + 1))
    assert available() == 1
    graph, _ = captured(lambda: x + 1)
    before = torch.npu.current_stream()
    with pytest.raises(RuntimeError, match="207008"):
        captured(lambda: x + 1)
    torch.npu.set_stream(before)
    assert call("aclrtCreateStream", ctypes.byref(Pointer())) == NO_STREAMS
    graph.reset()
    captured(lambda: x + 1)[0].reset()
    warm.reset()


EXPANDABLE = """
import torch, torch_npu
parts = [torch.full((3 << 20,), float(i), device="npu") for i in range(5)]
segments = torch_npu.npu.memory_snapshot()
assert any(segment.get("is_expandable") for segment in segments), segments
del parts[1], parts[2]
torch.npu.empty_cache()
parts.append(torch.full((9 << 20,), 7.0, device="npu"))
assert [part[-1].item() for part in parts] == [0.0, 2.0, 4.0, 7.0]
graph = torch.npu.NPUGraph()
with torch.npu.graph(graph):
    total = parts[0] + 1
graph.replay()
assert total[-1].item() == 1.0
print("done")
"""


def test_expandable_segments() -> None:
    env = {**os.environ, **environment(), "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True"}
    done = subprocess.run([sys.executable, "-c", EXPANDABLE], env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip().endswith("done"), done.stderr
