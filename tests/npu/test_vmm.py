"""Virtual memory of the device: torch_npu's tensors over pages that are mapped, shown twice, and unmapped."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

from npu_ops.kv import Dense, write_kv
from npu_ops.vmm import AclVmm
from tests.npu.device import npu
from xllm.runner.arena import Arena, Region, padded_bytes

PAGE = 2 << 20


@pytest.fixture
def driver() -> AclVmm:
    gc.collect()  # what other tests left would come back while memory is counted
    found = npu().vmm
    assert isinstance(found, AclVmm)
    return found


def test_a_page_shown_twice_is_one_memory(driver: AclVmm) -> None:
    assert driver.granularity_bytes == PAGE
    address, pool = driver.reserve(4 * PAGE), driver.create(2, PAGE)
    driver.map(address, pool, 0, 2)
    driver.map(address + 3 * PAGE, pool, 0, 1)
    x = driver.tensor(address, 4 * PAGE, torch.float32, None).view(4, -1)
    assert x.device == npu().device and x.data_ptr() == address
    assert (x[0] == 0).all() and (x[1] == 0).all()  # fresh pages are zeros
    x[0] = torch.arange(PAGE // 4, device=npu().device, dtype=torch.float32)
    assert torch.equal(x[3].cpu(), torch.arange(PAGE // 4, dtype=torch.float32))
    npu().synchronize()
    driver.unmap(address + 3 * PAGE, PAGE)
    driver.map(address + 2 * PAGE, pool, 1, 1)
    x[2].fill_(7)
    assert (x[1] == 7).all() and x[0, 5] == 5
    npu().synchronize()
    driver.release(address, 4 * PAGE)
    driver.destroy(pool)


def test_it_gives_back_what_it_took(driver: AclVmm) -> None:
    before = npu().available_memory_bytes()
    for _ in range(3):
        address, pool = driver.reserve(8 * PAGE), driver.create(3, PAGE)
        driver.map(address, pool, 0, 3)
        assert npu().available_memory_bytes() <= before - 3 * PAGE
        driver.release(address, 8 * PAGE)
        driver.destroy(pool)
    assert npu().available_memory_bytes() == before


def test_more_than_there_is(driver: AclVmm) -> None:
    before = npu().available_memory_bytes()
    with pytest.raises(MemoryError, match="aclrtMallocPhysical failed with error 207"):
        driver.create(npu().available_memory_bytes() // PAGE + 2, PAGE)
    assert npu().available_memory_bytes() == before


def test_layers_of_an_arena(driver: AclVmm) -> None:
    """Each block has its numbers of all layers in one page, and looks to each layer's operators like a cache."""
    shape = npu().kv_cache_shape(1, 128, 2, 64)[1:]
    page = padded_bytes(2 * 3 * 128 * 2 * 64 * 2, driver)
    arena = Arena(driver, num_pages=9, num_blocks=4, regions=[Region.dense(page)])
    arena.map(np.array([6, 7]), np.array([2, 0]))
    layers = arena.layers([[shape] * 2] * 3, torch.float16)
    for number, cache in enumerate(t for layer in layers for t in layer):
        cache[0], cache[2] = number, -number
    for number, cache in enumerate(t for layer in layers for t in layer):
        assert cache.shape == (9, *shape)
        assert (cache[6] == -number).all() and (cache[7] == number).all() and (cache[1] == 0).all()
    npu().synchronize()


def test_latents_and_their_rotated_parts(driver: AclVmm) -> None:
    """They lie as many of their own blocks apart, and look to operators like dense tensors, of which little exists."""
    shapes = [shape[1:] for shape in npu().latent_cache_shapes(1, 128, 512, 64, torch.float16)]
    arena = Arena(driver, num_pages=9, num_blocks=4, regions=[Region(PAGE, 8 * PAGE), Region(PAGE, PAGE)])
    arena.map(np.array([6, 7]), np.array([2, 0]))
    layers = arena.layers([shapes] * 3, torch.float16)
    for number, parts in enumerate(layers):
        dense = [Dense.of(part) for part in parts]
        assert [each.every for each in dense] == [128, 128] and all(each.cache.is_contiguous() for each in dense)
        slots = torch.tensor([2 * 128 + 5, 3], dtype=torch.int32, device=npu().device)
        new = [torch.full((2, *shape[1:]), 10.0 * number + i, dtype=torch.float16, device=npu().device)
               for i, shape in enumerate(shapes)]
        write_kv(key_TKH=new[0], value_TKH=new[1], key=dense[0], value=dense[1], slots_T=dense[0].slots(slots))
    for number, parts in enumerate(layers):
        for i, part in enumerate(parts):
            assert (part[6, 5] == 10 * number + i).all() and (part[7, 3] == 10 * number + i).all()
            assert not part[6, :5].any() and not part[7, 4:].any() and not part[1].any()
    npu().synchronize()
