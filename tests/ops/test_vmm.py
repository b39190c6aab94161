"""The virtual memory of a device: every call of `VmmDriver` for real, and attention beside unmapped pages.

The CPU's driver runs as it is. Ascend's runs on a library that stands in for ACL (`fake_acl.c`), with host memory as
the device's, so that the calls and their arguments are the real ones and only the tensor is another.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from backends import get_backend
from backends.backend import BackendError
from backends.cpu import vmm
from backends.cpu.build import COMPILERS
from backends.cpu.vmm import CpuVmm, make_cpu_vmm
from backends.opset import OpSet
from backends.vmm import VmmDriver
from cuda_ops.vmm import CudaVmm
from npu_ops.vmm import AclVmm
from tests.ops.conftest import Paged
from xllm.runner.arena import Arena, Region, padded_bytes

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")
TIB = 1 << 40


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def num_mappings(address: int, num_bytes: int) -> int:
    """Of a pool's pages, which are files in memory, in that range: what other threads map meanwhile is elsewhere."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    spans = [line.split()[0].split("-") for line in lines if "memfd:" in line]
    return sum(int(begin, 16) < address + num_bytes and int(end, 16) > address for begin, end in spans)


def is_readable(address: int) -> bool:
    """Whether anything is mapped there, without the signal: the kernel answers EFAULT instead."""
    reader, writer = os.pipe()
    write = ctypes.CDLL(None, use_errno=True).write
    write.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    try:
        written = write(writer, address, 1)
        assert written == 1 or ctypes.get_errno() == errno.EFAULT
        return bool(written == 1)
    finally:
        os.close(reader)
        os.close(writer)


class Range:
    """A reservation with a pool of eight pages, and a row of the tensor for each virtual page."""

    def __init__(self, driver: VmmDriver, num_bytes: int, num_granules: int = 3):
        self.driver, self.num_bytes = driver, num_bytes
        self.page_bytes = num_granules * driver.granularity_bytes
        self.address = driver.reserve(num_bytes)
        self.pool = driver.create(8, self.page_bytes)
        usable = num_bytes // self.page_bytes * self.page_bytes
        self.pages: Tensor = driver.tensor(self.address, usable, torch.float32, self).view(-1, self.page_bytes // 4)

    def at(self, page: int) -> int:
        return self.address + page * self.page_bytes

    def map(self, page: int, physical: int, count: int = 1, *, touch: bool = True) -> None:
        self.driver.map(self.at(page), self.pool, physical, count, touch=touch)

    def unmap(self, page: int, count: int = 1) -> None:
        self.driver.unmap(self.at(page), count * self.page_bytes)

    def close(self) -> None:
        del self.pages
        self.driver.release(self.address, self.num_bytes)
        self.driver.destroy(self.pool)


class HostAcl(AclVmm):
    """Ascend's driver over memory that torch can see without torch_npu."""

    def tensor(self, address: int, num_bytes: int, dtype: torch.dtype, owner: object) -> Tensor:
        return CpuVmm().tensor(address, num_bytes, dtype, owner)


@pytest.fixture(scope="session")
def fake_acl(tmp_path_factory: pytest.TempPathFactory) -> str:
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        pytest.skip("no C compiler here")
    library = tmp_path_factory.mktemp("acl") / "libascendcl.so"
    source = Path(__file__).with_name("fake_acl.c")
    subprocess.run([compiler, "-O1", "-Wall", "-Werror", "-shared", "-fPIC", source, "-o", library], check=True)
    return str(library)


@pytest.fixture(params=["cpu", "acl"])
def driver(request: pytest.FixtureRequest) -> VmmDriver:
    return CpuVmm() if request.param == "cpu" else HostAcl(library=request.getfixturevalue("fake_acl"))


@pytest.fixture
def tib(driver: VmmDriver) -> Iterator[Range]:
    made = Range(driver, TIB)
    yield made
    made.close()


def test_it_is_the_backend_s() -> None:
    driver = get_backend("cpu", compiled=False).vmm
    assert isinstance(driver, CpuVmm) and isinstance(driver, VmmDriver)
    assert driver.granularity_bytes == os.sysconf("SC_PAGE_SIZE")


def test_any_thread_may_map(driver: VmmDriver) -> None:
    """The submitter's thread maps what the loader's made; a device is a thread's own."""
    size = driver.granularity_bytes
    pool, address = driver.create(1, size), driver.reserve(2 * size)
    thread = threading.Thread(target=lambda: driver.map(address + size, pool, 0, 1))
    thread.start()
    thread.join()
    page = driver.tensor(address + size, size, torch.uint8, None)
    assert page.fill_(7).sum() == 7 * size
    driver.release(address, 2 * size)
    driver.destroy(pool)


def test_drivers_of_devices_that_are_not_here() -> None:
    for made in (lambda: AclVmm(library="libascendcl-of-nobody.so"), CudaVmm):
        with pytest.raises(RuntimeError, match=r"CANN|cuda-bindings|CUDA|NVIDIA"):
            made()


def test_reserving_takes_no_memory(tib: Range) -> None:
    before = resident_bytes()
    assert tib.pages.nbytes > TIB - tib.page_bytes
    other = Range(tib.driver, TIB)
    assert other.address % other.driver.granularity_bytes == 0
    assert resident_bytes() - before < 8 << 20
    assert not is_readable(other.at(0)) and not is_readable(other.at(len(other.pages) - 1))
    other.close()


def test_pages_far_apart_in_one_tensor(tib: Range) -> None:
    last = len(tib.pages) - 1
    for page, physical in ((0, 3), (1000, 5), (last, 7)):
        tib.map(page, physical)
        tib.pages[page] = physical + 0.5
    assert [float(tib.pages[page].mean()) for page in (0, 1000, last)] == [3.5, 5.5, 7.5]
    assert not is_readable(tib.at(1)) and not is_readable(tib.at(999)) and not is_readable(tib.at(1001))


def test_fresh_pages_are_zero(tib: Range) -> None:
    tib.map(9, 0, 8)
    assert not tib.pages[9:17].any()


@pytest.mark.parametrize("touch", [True, False])
def test_one_page_at_two_addresses(tib: Range, touch: bool) -> None:
    tib.map(7, 2, touch=touch)
    tib.map(400, 2, touch=touch)
    tib.pages[400, 5] = 9.0
    assert tib.pages[7, 5] == 9.0
    tib.pages[7, -1] = 4.0
    assert tib.pages[400, -1] == 4.0


def test_a_run_of_pages(tib: Range) -> None:
    tib.map(100, 1, 6)
    assert num_mappings(tib.address, tib.num_bytes) == (1 if isinstance(tib.driver, CpuVmm) else 6)  # of one call
    tib.pages[100:106] = torch.arange(6.0)[:, None]
    tib.map(500, 4)
    assert tib.pages[500, 0] == 3.0
    assert torch.equal(tib.pages[100:106].sum(1) / tib.pages.shape[1], torch.arange(6.0))  # a view over all six


def test_mapping_again_replaces(tib: Range) -> None:
    tib.map(10, 0, 3)
    tib.pages[10:13] = torch.tensor([1.0, 2.0, 3.0])[:, None]
    tib.map(11, 2)
    assert tib.pages[10:13, 0].tolist() == [1.0, 3.0, 3.0]
    tib.map(11, 1)
    assert tib.pages[10:13, 0].tolist() == [1.0, 2.0, 3.0]  # physical page 1 kept its contents


def test_unmapping(tib: Range) -> None:
    tib.map(20, 0, 4)
    tib.pages[20:24] = 1.0
    tib.unmap(21, 2)
    assert [is_readable(tib.at(page)) for page in range(19, 25)] == [False, True, False, False, True, False]
    tib.unmap(18, 10)  # in part unmapped already
    assert not any(is_readable(tib.at(page)) for page in range(18, 28))
    tib.map(30, 0, 4)
    assert (tib.pages[30:34] == 1.0).all()
    tib.map(21, 3)
    assert tib.pages[21, 0] == 1.0


def test_release_gives_all_back(driver: VmmDriver) -> None:
    made = Range(driver, 1 << 30)
    for page in range(0, 80, 2):
        made.map(page, page % 8)
    assert num_mappings(made.address, made.num_bytes) == 40
    made.close()
    assert num_mappings(made.address, made.num_bytes) == 0


def test_no_range_of_that_size(driver: VmmDriver) -> None:
    with pytest.raises(MemoryError, match=r"mmap|aclrtReserve"):
        driver.reserve(1 << 62)


def test_the_limit_on_mappings_is_the_system_s() -> None:
    allowed = CpuVmm().max_mappings()
    num_all = len(Path("/proc/self/maps").read_text().splitlines())
    assert allowed is not None
    limit = int(Path("/proc/sys/vm/max_map_count").read_text())
    assert 0 <= allowed <= max(0, limit - num_all - vmm.MAPPINGS_MARGIN // 2)


def test_another_system_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vmm.sys, "platform", "darwin")
    with pytest.raises(BackendError, match=r"memfd_create.*darwin"):
        CpuVmm()
    assert make_cpu_vmm() is None


# --- an arena over it


def make_arena(driver: VmmDriver, num_layers: int, case: Paged, num_pages: int, num_blocks: int) -> Arena:
    page_bytes = padded_bytes(4 * 2 * num_layers * case.k_cache[0].numel(), driver)
    return Arena(driver, num_pages=num_pages, num_blocks=num_blocks, regions=[Region.dense(page_bytes)])


def test_an_arena_goes_when_its_last_view_does(driver: VmmDriver) -> None:
    page_bytes = 2 * driver.granularity_bytes
    arena = Arena(driver, num_pages=100, num_blocks=10, regions=[Region.dense(page_bytes)])
    (address,) = arena._addresses
    arena.map(np.array([50, 52, 54]), np.array([1, 3, 5]))
    key = arena.layers([[(2, 4, 8)] * 2] * 2, torch.float32)[1][0]
    del arena
    gc.collect()
    key[52] = 5.0
    assert key[3, 1, 3, 7] == 5.0
    assert num_mappings(address, 100 * page_bytes) >= 3
    del key
    gc.collect()
    assert num_mappings(address, 100 * page_bytes) == 0


def test_layers_share_a_page_and_nothing_else(driver: VmmDriver) -> None:
    arena = Arena(driver, num_pages=9, num_blocks=4, regions=[Region.dense(driver.granularity_bytes)])
    arena.map(np.array([6, 7]), np.array([2, 0]))
    layers = arena.layers([[(2, 4, 8)] * 2] * 3, torch.float32)
    for number, cache in enumerate(t for layer in layers for t in layer):
        assert cache.shape == (9, 2, 4, 8)
        cache[0], cache[2] = number, -number
    for number, cache in enumerate(t for layer in layers for t in layer):
        assert (cache[6] == -number).all() and (cache[7] == number).all() and (cache[1] == 0).all()


def test_regions_of_their_own(driver: VmmDriver) -> None:
    """Each part of a layer has one; where its pages lie further apart than they are large, nothing lies between."""
    granule = driver.granularity_bytes
    arena = Arena(driver, num_pages=9, num_blocks=4, regions=[Region(2 * granule, 16 * granule), Region.dense(granule)])
    assert arena.page_bytes == 3 * granule
    layers = arena.layers([[(granule // 4,), (granule // 32,)]] * 2, torch.float32)
    refused = arena.map(np.array([5, 6, 8]), np.array([2, 3, 0]))
    assert not len(refused)
    for number, parts in enumerate(layers):
        for part, cache in enumerate(parts):
            assert cache.stride(0) * 4 == [16 * granule, granule][part]
            cache[2], cache[3], cache[0] = number, 10 + part, -1
    for number, parts in enumerate(layers):
        for part, cache in enumerate(parts):
            assert (cache[5] == number).all() and (cache[6] == 10 + part).all() and (cache[8] == -1).all()
    assert not len(arena.unmap(np.array([5, 6])))
    arena.map(np.array([5]), np.array([3]))
    assert all((cache[5] == 10 + part).all() for parts in layers for part, cache in enumerate(parts))


@pytest.mark.parametrize("step", [([1, 1, 1], [1, 16, 83]), ([5, 33, 1], [70, 40, 513])], ids=["decode", "mixed"])
@pytest.mark.parametrize("head_dim", [64, 6])
def test_attention_touches_no_unmapped_page(ops: OpSet, driver: VmmDriver, step: tuple[list[int], list[int]],
                                            head_dim: int) -> None:
    """Each sequence's last page is followed, and its first preceded, by one that would kill the process."""
    case = Paged(query_lens=step[0], seq_lens=step[1], num_heads=4, num_kv_heads=2, head_dim=head_dim, block_size=16,
                 contiguous=True)  # fmt: skip
    q_TNH = case.queries()
    wanted, in_window = case.attend(ops, q_TNH), case.attend(ops, q_TNH, window=20)
    bases = case.meta.kv_base_S
    assert bases is not None
    counts = [-(-length // 16) for length in case.seq_lens]
    arena = make_arena(driver, 2, case, 10 * sum(counts), sum(counts))
    k_cache, v_cache = arena.layers([[case.k_cache.shape[1:]] * 2] * 2, torch.float32)[1]
    shuffled, page, taken = torch.randperm(sum(counts)), sum(counts) + 1, 0
    for s, count in enumerate(counts):
        blocks, old = shuffled[taken : taken + count], slice(int(bases[s]), int(bases[s]) + count)
        k_cache[blocks], v_cache[blocks] = case.k_cache[old], case.v_cache[old]
        arena.map(np.arange(page, page + count), blocks.numpy())
        bases[s], page, taken = page, page + count + 1, taken + count
    case.k_cache, case.v_cache = k_cache, v_cache
    assert torch.equal(case.attend(ops, q_TNH), wanted)
    assert torch.equal(case.attend(ops, q_TNH, window=20), in_window)
