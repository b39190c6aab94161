"""Where a block's layers lie in its payload, which format is chosen, and that a model goes on from what comes back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from backends.backend import Backend
from tests.runner.harness import Driver, make_config
from tests.runner.tiny_model import PROMPT, Truth
from xllm.config import KV_STORE_DTYPES, EngineConfig
from xllm.errors import ConfigError
from xllm.runner.kv_codec import KVCodec

Layers = list[tuple[Tensor, ...]]


@pytest.fixture
def layers() -> Layers:
    """Three layers of other numbers of heads: 4 blocks of 8 positions, 16 numbers a head."""
    torch.manual_seed(1)
    return [(torch.randn(4, heads, 8, 16), torch.randn(4, heads, 8, 16)) for heads in (2, 1, 3)]


def store(codec: KVCodec, backend: Backend, layers: Layers, host: Tensor, blocks: list[int], slots: list[int]) -> None:
    for layer, caches in enumerate(layers):
        codec.export_layer(backend.ops, caches, torch.tensor(blocks), host, torch.tensor(slots), layer)


def load(codec: KVCodec, backend: Backend, layers: Layers, host: Tensor, blocks: list[int], slots: list[int]) -> None:
    for layer, caches in enumerate(layers):
        codec.import_layer(backend.ops, caches, torch.tensor(blocks), host, torch.tensor(slots), layer)


def test_layers_follow_each_other_without_gaps(backend: Backend, layers: Layers) -> None:
    codec = KVCodec.for_cache("auto", layers, backend.ops)
    assert codec.payload_bytes == 6144
    ranges = [(0, 2048), (2048, 3072), (3072, 6144)]  # keys and values, 128 fp32 numbers a head
    for layer, (first, end) in enumerate(ranges):
        host = torch.full((1, 6144), 0xA5, dtype=torch.uint8)
        zeros = tuple(torch.zeros_like(cache) for cache in layers[layer])
        codec.export_layer(backend.ops, zeros, torch.tensor([2]), host, torch.tensor([0]), layer)
        assert not host[0, first:end].any() and (host[0, :first] == 0xA5).all() and (host[0, end:] == 0xA5).all()


def test_a_payload_is_the_blocks_bytes(backend: Backend, layers: Layers) -> None:
    codec = KVCodec.for_cache("fp32", layers, backend.ops)
    host = torch.zeros(3, codec.payload_bytes, dtype=torch.uint8)
    store(codec, backend, layers, host, [3, 1], [0, 2])
    for block, slot in ((3, 0), (1, 2)):
        numbers = torch.cat([cache[block].flatten() for pair in layers for cache in pair])
        assert torch.equal(host[slot].view(torch.float32), numbers)
    assert not host[1].any()


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16", "int8", "fp8"])
def test_one_layer_alone_comes_back(backend: Backend, layers: Layers, name: str) -> None:
    codec = KVCodec.for_cache(name, layers, backend.ops)
    host = torch.zeros(5, codec.payload_bytes, dtype=torch.uint8)
    store(codec, backend, layers, host, [0, 1, 2, 3], [4, 0, 3, 1])
    back = [(torch.zeros_like(k), torch.zeros_like(v)) for k, v in layers]
    codec.import_layer(backend.ops, back[1], torch.tensor([2]), host, torch.tensor([3]), 1)
    assert all(not cache.any() for pair in (back[0], back[2]) for cache in pair)
    for new, old in zip(back[1], layers[1]):
        assert not new[[0, 1, 3]].any()
        assert (new[2] - old[2]).norm() <= {"fp32": 0, "fp8": 0.05}.get(name, 0.01) * old[2].norm()


@pytest.mark.parametrize(("dtype", "format"), [(torch.float32, "fp32"), (torch.bfloat16, "bf16"),
                                               (torch.float16, "fp16")], ids=str)
def test_auto_is_the_caches_dtype(backend: Backend, layers: Layers, dtype: torch.dtype, format: str) -> None:
    codec = KVCodec.for_cache("auto", [(k.to(dtype), v.to(dtype)) for k, v in layers], backend.ops)
    assert (codec.format, codec.cache_dtype) == (format, dtype)


def test_names_tell_formats_apart(backend: Backend, layers: Layers) -> None:
    """They go into the disk's fingerprint; another spelling of a format is the same format."""
    names = {choice: KVCodec.for_cache(choice, layers, backend.ops).name for choice in KV_STORE_DTYPES}
    assert len(set(names.values())) == 5
    assert names["auto"] == names["fp32"] == names["float32"]
    assert (names["bfloat16"], names["float16"], names["fp8_e4m3"]) == (names["bf16"], names["fp16"], names["fp8"])


def test_the_setting() -> None:
    assert EngineConfig().cache.kv_store_dtype == "auto"
    assert EngineConfig.from_flat(kv_store_dtype="int8").cache.kv_store_dtype == "int8"
    with pytest.raises(ConfigError, match="kv_store_dtype must be one of auto, fp32"):
        EngineConfig.from_flat(kv_store_dtype="int4")
    with pytest.raises(ConfigError, match="kv_store_dtype int8 needs host_cache_size"):
        make_config(kv_store_dtype="int8")
    assert make_config(kv_store_dtype="int8", host_cache_size="1GiB").cache.kv_store_dtype == "int8"
    with pytest.raises(ConfigError, match="kv_store_dtype bf16: KV that is int8 on the device is stored as it is"):
        make_config(kv_cache_dtype="int8", kv_store_dtype="bf16", host_cache_size="1GiB")


@pytest.mark.parametrize("name", ["fp32", "int8"])
def test_a_sequence_goes_on_from_other_blocks(make_driver: Callable[..., Driver], backend: Backend, truth: Truth,
                                              name: str) -> None:
    """Its blocks are stored, wiped, and brought back elsewhere; fp32 continues with the very tokens."""
    driver: Any = make_driver()
    driver.add("first", PROMPT)
    driver.step()
    seq, cache = driver.remove("first"), driver.runner.kv_cache
    full = seq.num_computed // 8
    codec = KVCodec.for_cache(name, cache.layers, backend.ops)
    host = torch.zeros(full, codec.payload_bytes, dtype=torch.uint8)
    store(codec, backend, cache.layers, host, seq.blocks[:full], list(range(full)))
    for pair in cache.layers:
        for tensor in pair:
            tensor.fill_(float("nan"))
    blocks = [block for block in driver.free_blocks if block not in seq.blocks][:full]
    driver.free_blocks = [block for block in driver.free_blocks if block not in blocks]
    load(codec, backend, cache.layers, host, blocks, list(range(full)))
    driver.add("again", PROMPT, num_computed=full * 8, blocks=blocks)
    tokens = driver.generate("again", 20)
    assert tokens[:3] == truth.tokens[:3]
    if name == "fp32":
        assert tokens == truth.tokens[:20]
