"""KV caches that are not pairs of one shape: a latent, layers of other widths, and both in one model.

The specs are invented. What is computed from them - bytes of a block and of a page, tensors, places in a page and in a
payload - is checked against sums written out here, and by moving random bytes through all of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from backends.backend import Backend
from backends.reference.kv_codes import QUANTISED, row_width
from tests.runner.harness import make_config
from xllm.errors import ConfigError
from xllm.models.kv_spec import KVSpec
from xllm.runner.arena import Arena, Region, padded_bytes
from xllm.runner.host_mover import HostMover
from xllm.runner.kv_cache import KVCache, block_bytes, page_bytes, page_regions, plan_num_blocks
from xllm.runner.kv_codec import KVCodec

P, NUM_BLOCKS = 8, 6
LATENT = (KVSpec(num_heads=1, widths=(40,)),) * 3
WIDTHS = (KVSpec(num_heads=2, widths=(16, 16)), KVSpec(num_heads=3, widths=(8, 24)), KVSpec(num_heads=1, widths=(4, 4)))
MIXED = (KVSpec(num_heads=1, widths=(40,)), KVSpec(num_heads=2, widths=(16, 8), sliding_window=5),
         KVSpec(num_heads=4, widths=(12,)), KVSpec(num_heads=1, widths=(64, 64)))
CASES = {"latent": LATENT, "widths": WIDTHS, "mixed": MIXED}
DTYPES = [torch.float32, torch.bfloat16, *QUANTISED]
Specs = tuple[KVSpec, ...]


@pytest.fixture(params=CASES.values(), ids=CASES)
def specs(request: pytest.FixtureRequest) -> Specs:
    found: Specs = request.param
    return found


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = request.param
    return found


MakeCache = Callable[..., KVCache]


@pytest.fixture(params=["tensors", "arena"])
def make_cache(request: pytest.FixtureRequest, backend: Backend) -> MakeCache:
    """A cache of random bytes, allocated tensor by tensor, or in an arena whose pages show the blocks."""
    if request.param == "arena" and backend.vmm is None:
        pytest.skip("no virtual memory management here")

    def make(specs: Specs, dtype: torch.dtype) -> KVCache:
        arena = None
        if request.param == "arena":
            assert backend.vmm is not None
            size = padded_bytes(block_bytes(backend, specs, P, dtype), backend.vmm)
            arena = Arena(backend.vmm, num_pages=NUM_BLOCKS + 2, num_blocks=NUM_BLOCKS, regions=[Region.dense(size)])
        cache = KVCache(backend, specs, num_blocks=NUM_BLOCKS, block_size=P, dtype=dtype, arena=arena)
        for part in parts_of(cache):
            part.copy_(torch.randint(0, 256, part.shape, dtype=torch.uint8))
        return cache

    return make


def part_bytes(spec: KVSpec, part: int, dtype: torch.dtype) -> int:
    """Of one block: each position of each head is so many numbers, and a scale where the cache is quantised."""
    return P * spec.num_heads * row_width(spec.widths[part], dtype) * dtype.itemsize


def all_part_bytes(specs: Specs, dtype: torch.dtype) -> list[int]:
    return [part_bytes(spec, part, dtype) for spec in specs for part in range(len(spec.widths))]


def parts_of(cache: KVCache) -> list[Tensor]:
    """The bytes of each part's blocks: uint8 [NUM_BLOCKS, bytes]."""
    return [tensor.view(torch.uint8).as_strided((NUM_BLOCKS, tensor[0].numel() * tensor.itemsize),
                                                (tensor.stride(0) * tensor.itemsize, 1))
            for parts in cache.layers for tensor in parts]


def test_bytes_of_a_block(backend: Backend, specs: Specs, dtype: torch.dtype) -> None:
    assert block_bytes(backend, specs, P, dtype) == sum(all_part_bytes(specs, dtype))


def test_a_known_block(backend: Backend) -> None:
    """By hand: 8 positions of fp32; 40 numbers, 2 heads of 16 and 8, 4 heads of 12, and twice 64."""
    assert block_bytes(backend, MIXED, 8, torch.float32) == 8 * 4 * (40 + 2 * (16 + 8) + 4 * 12 + 2 * 64)


def test_tensors_are_by_layer_and_part(backend: Backend, make_cache: MakeCache, specs: Specs,
                                       dtype: torch.dtype) -> None:
    cache = make_cache(specs, dtype)
    assert [len(parts) for parts in cache.layers] == [len(spec.widths) for spec in specs]
    assert [part.shape[1] for part in parts_of(cache)] == all_part_bytes(specs, dtype)
    for parts, spec in zip(cache.layers, specs):
        for tensor, width in zip(parts, spec.widths):
            wanted = backend.kv_cache_shape(len(tensor), P, spec.num_heads, row_width(width, dtype))
            assert tensor.shape == wanted and tensor.dtype is dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn], ids=str)
def test_parts_follow_each_other_in_a_page(backend: Backend, specs: Specs, dtype: torch.dtype) -> None:
    """Seen from the arena: block b's bytes are the parts' one after the other, `page_bytes` from block to block."""
    if backend.vmm is None:
        pytest.skip("no virtual memory management here")
    sizes = all_part_bytes(specs, dtype)
    page = padded_bytes(sum(sizes), backend.vmm)
    arena = Arena(backend.vmm, num_pages=NUM_BLOCKS + 3, num_blocks=NUM_BLOCKS, regions=[Region.dense(page)])
    cache = KVCache(backend, specs, num_blocks=NUM_BLOCKS, block_size=P, dtype=dtype, arena=arena)
    for part in parts_of(cache):
        part.copy_(torch.randint(0, 256, part.shape, dtype=torch.uint8))
    first = cache.layers[0][0].data_ptr()
    offsets = [tensor.data_ptr() - first for parts in cache.layers for tensor in parts]
    assert offsets == [sum(sizes[:index]) for index in range(len(sizes))]
    assert {tensor.stride(0) * tensor.itemsize for parts in cache.layers for tensor in parts} == {page}
    arena.map(np.array([NUM_BLOCKS + 1]), np.array([4]))  # a second view of block 4
    for tensor in (tensor.view(torch.uint8) for parts in cache.layers for tensor in parts):
        assert torch.equal(tensor[NUM_BLOCKS + 1], tensor[4])


def test_too_small_a_page_is_noticed(backend: Backend) -> None:
    if backend.vmm is None:
        pytest.skip("no virtual memory management here")
    granule = backend.vmm.granularity_bytes
    arena = Arena(backend.vmm, num_pages=2, num_blocks=2, regions=[Region.dense(granule)])
    with pytest.raises(AssertionError, match="too small"):
        arena.layers([[(granule // 4,), (1,)]], torch.float32)


def test_copies_are_of_every_part(make_cache: MakeCache, specs: Specs, dtype: torch.dtype) -> None:
    cache = make_cache(specs, dtype)
    before = [part.clone() for part in parts_of(cache)]
    cache.copy_blocks(np.array([1, 5], dtype=np.int32), np.array([0, 3], dtype=np.int32))
    for found, old in zip(parts_of(cache), before):
        assert torch.equal(found, old[[1, 1, 2, 5, 4, 5]])


def test_a_payload_is_the_parts_of_all_layers(backend: Backend, make_cache: MakeCache, specs: Specs,
                                              dtype: torch.dtype) -> None:
    """Saved and brought back elsewhere by the real mover, layer by layer: the very bytes, and no others."""
    cache = make_cache(specs, dtype)
    codec = KVCodec.for_cache("auto", cache.layers, backend.ops)
    mover = HostMover(backend, cache, codec, num_host_slots=4)
    assert mover.num_layers == len(specs) and mover.payload_bytes == sum(all_part_bytes(specs, dtype))
    before = [part.clone() for part in parts_of(cache)]
    mover.save(np.array([4, 1]), np.array([2, 0]))
    for block, slot in ((4, 2), (1, 0)):
        assert bytes(mover.payload(slot)) == b"".join(part[block].numpy().tobytes() for part in before)
    for layer in range(len(specs)):
        mover.load_layer(np.array([0, 2]), np.array([5, 3]), layer)
    for found, old in zip(parts_of(cache), before):
        assert torch.equal(found, old[[0, 1, 2, 4, 4, 1]])


@pytest.mark.parametrize("name", ["bf16", "int8", "fp8"])
def test_a_stored_format_keeps_each_part_apart(backend: Backend, specs: Specs, name: str) -> None:
    """One layer's part of the payload alone comes back to that layer, rounded as the format says."""
    cache, back = (KVCache(backend, specs, num_blocks=2, block_size=P, dtype=torch.float32) for _ in range(2))
    for parts in cache.layers:
        for tensor in parts:
            tensor.normal_()
    codec = KVCodec.for_cache(name, cache.layers, backend.ops)
    host, ids = torch.zeros(2, codec.payload_bytes, dtype=torch.uint8), torch.tensor([0, 1])
    for layer, parts in enumerate(cache.layers):
        codec.export_layer(backend.ops, parts, ids, host, ids, layer)
    codec.import_layer(backend.ops, back.layers[1], ids, host, ids, 1)
    for new, old in zip(back.layers[1], cache.layers[1], strict=True):
        assert (new - old).norm() <= {"fp8": 0.05}.get(name, 0.01) * old.norm()
    assert not any(tensor.any() for layer in (0, 2) for tensor in back.layers[layer])


@pytest.mark.parametrize("dense", [False, True])
def test_a_page_is_whole_blocks_of_each_part_where_it_must(backend: Backend, specs: Specs, dense: bool) -> None:
    machine: Any = SimpleNamespace(vmm=SimpleNamespace(granularity_bytes=4096), dense_kv=dense,
                                   kv_cache_shape=backend.kv_cache_shape)
    found = page_bytes(make_config(kv_layout="xtensor"), machine, specs, torch.float32)
    sizes = all_part_bytes(specs, torch.float32)
    assert found >= sum(sizes) and found % 4096 == 0
    assert not dense or all(found % size == 0 for size in sizes)
    assert found - (math.lcm(4096, *sizes) if dense else 4096) < sum(sizes)


LATENTS = [KVSpec(num_heads=1, widths=(576,), rotated_width=64)] * 3


@pytest.mark.parametrize(("block_size", "granule", "pages", "strides"), [
    (128, 2**21, [2**21, 2**21], [2**24, 2**21]),  # 48 KiB of rotated parts, and from page to page 128 blocks
    (16, 2**21, [2**21, 2**21], [2**24, 2**21]), (16, 4096, [49152, 8192], [65536, 8192]),
    (16, 1024, [49152, 6144], [49152, 6144]),
])
def test_latents_in_two_parts_lie_as_many_blocks_apart(block_size: int, granule: int, pages: list[int],
                                                       strides: list[int]) -> None:
    """Where operators find both by one number; other devices have pages of both."""
    machine: Any = SimpleNamespace(
        vmm=SimpleNamespace(granularity_bytes=granule), dense_kv=True,
        latent_cache_shapes=lambda blocks, P, latent, rotated, dtype: ((blocks, P, 1, latent), (blocks, P, 1, rotated)))
    config = make_config(kv_layout="xtensor", block_size=block_size)
    assert page_regions(config, machine, LATENTS, torch.float16) == list(map(Region, pages, strides))
    assert page_bytes(config, machine, LATENTS, torch.float16) == sum(pages)
    machine.dense_kv = False
    content = 3 * block_size * 576 * 2
    size = -(-content // granule) * granule
    assert page_regions(config, machine, LATENTS, torch.float16) == [Region(size, size)]


def test_how_many_blocks_fit(backend: Backend, specs: Specs) -> None:
    limit = 20 * sum(all_part_bytes(specs, torch.float32)) - 1
    config = make_config(num_kv_blocks=None, kv_cache_memory_bytes=limit)
    assert plan_num_blocks(config, backend, specs, torch.float32) == 19


@pytest.mark.parametrize(("size", "heads"), [(1, [1, 2, 4, 1]), (2, [1, 1, 2, 1]), (4, [1, 1, 1, 1])])
def test_what_a_rank_holds(size: int, heads: Sequence[int]) -> None:
    """A latent has one head, so every rank has all of it."""
    found = [spec.on_one_of(size) for spec in MIXED]
    assert [spec.num_heads for spec in found] == heads
    assert [(spec.widths, spec.sliding_window) for spec in found] == [(s.widths, s.sliding_window) for s in MIXED]


def test_heads_that_cannot_be_shared() -> None:
    with pytest.raises(ConfigError, match=r"tensor_parallel_size 2 does not divide the number of kv heads \(3\)"):
        WIDTHS[1].on_one_of(2)
