"""How many blocks are allocated, and what is said when too few fit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from backends.backend import Backend
from tests.runner.harness import make_config
from xllm.errors import ConfigError
from xllm.models.causal_lm import CausalLM
from xllm.models.kv_spec import KVSpec
from xllm.models.model_config import ModelConfig
from xllm.runner.kv_cache import KVCache, block_bytes, cache_dtype, compute_dtype, page_bytes, plan_num_blocks

Specs = tuple[KVSpec, ...]
# 2 layers, keys and values, 2 heads, 16 numbers a head, 8 tokens a block, 4 bytes each
BLOCK_BYTES = 2 * 2 * 2 * 16 * 8 * 4


@pytest.fixture
def specs(model: CausalLM) -> Specs:
    assert model.kv_specs == (KVSpec(num_heads=2, widths=(16, 16)),) * 2
    return model.kv_specs


@pytest.fixture
def model_config(model: CausalLM) -> ModelConfig:
    return model.config


def device(backend: Backend, *, share: float = 0.5, memory_bytes: int = 10**9, num_reserved: int = 0,
           on_host: bool = True) -> Any:
    """The backend, with another amount of memory, of which a KV cache may have a share."""
    return SimpleNamespace(computes_on_host=on_host, kv_memory_share=share, available_memory_bytes=lambda: memory_bytes,
                           kv_cache_shape=backend.kv_cache_shape, num_reserved_blocks=num_reserved)


def test_bytes_of_a_block(backend: Backend, specs: Specs) -> None:
    assert block_bytes(backend, specs, 8, torch.float32) == BLOCK_BYTES
    assert block_bytes(backend, specs, 8, torch.bfloat16) == BLOCK_BYTES // 2
    cache = KVCache(backend, specs, num_blocks=5, block_size=8, dtype=torch.float32)
    assert sum(t.nbytes for layer in cache.layers for t in layer) == 5 * BLOCK_BYTES


@pytest.mark.parametrize(("settings", "share", "num_blocks"), [
    ({"num_kv_blocks": 21}, 0.5, 21),
    ({"num_kv_blocks": 100_000}, 0.5, 100_000),
    ({"num_kv_blocks": None, "kv_cache_memory_bytes": 20 * BLOCK_BYTES - 1}, 0.5, 19),
    ({"num_kv_blocks": None, "gpu_memory_utilization": 0.5}, 0.5, 25),
    ({"num_kv_blocks": None, "gpu_memory_utilization": 0.5}, 1.0, 50),
    ({"num_kv_blocks": None, "max_num_seqs": 1}, 0.5, 17),  # 128 tokens are 16 blocks
], ids=str)
def test_how_many(backend: Backend, specs: Specs, settings: dict[str, Any], share: float, num_blocks: int) -> None:
    machine = device(backend, share=share, memory_bytes=100 * BLOCK_BYTES + 5)
    assert plan_num_blocks(make_config(**settings), machine, specs, torch.float32) == num_blocks


@pytest.mark.parametrize(("ranks", "on_host", "num_blocks"), [
    ({"tensor_parallel_size": 2}, True, 50), ({"tensor_parallel_size": 2}, False, 100),
    ({"worker_ranks": 2, "worker": "processes"}, False, 50),
], ids=str)
def test_ranks_share_the_host_s_memory_and_have_devices_of_their_own(backend: Backend, specs: Specs,
                                                                     ranks: dict[str, Any], on_host: bool,
                                                                     num_blocks: int) -> None:
    machine = device(backend, share=1.0, memory_bytes=100 * BLOCK_BYTES, on_host=on_host)
    config = make_config(num_kv_blocks=None, gpu_memory_utilization=1.0, **ranks)
    assert plan_num_blocks(config, machine, specs, torch.float32) == num_blocks


@pytest.mark.parametrize(("settings", "num_blocks"), [
    ({"num_kv_blocks": 21}, 23),  # that many to use
    ({"num_kv_blocks": None, "kv_cache_memory_bytes": 20 * BLOCK_BYTES}, 20),  # all within the limit
    ({"num_kv_blocks": None, "max_num_seqs": 1}, 19),
], ids=str)
def test_the_device_s_own_blocks_come_on_top(backend: Backend, specs: Specs, settings: dict[str, Any],
                                             num_blocks: int) -> None:
    machine = device(backend, memory_bytes=100 * BLOCK_BYTES, num_reserved=2)
    assert plan_num_blocks(make_config(**settings), machine, specs, torch.float32) == num_blocks


@pytest.mark.parametrize(("granularity", "dense", "num_bytes"), [
    (4096, False, 12288), (4096, True, 12288), (5120, False, 15360), (5120, True, 15360), (8192, False, 16384),
    (8192, True, 24576),
])
def test_pages_hold_whole_blocks_of_each_layer_where_they_must(specs: Specs, granularity: int,
                                                               dense: bool, num_bytes: int) -> None:
    """3 KiB of keys, and of values, of each of two layers."""
    machine: Any = SimpleNamespace(vmm=SimpleNamespace(granularity_bytes=granularity), dense_kv=dense,
                                   kv_cache_shape=lambda *sizes: (1, 768))
    assert page_bytes(make_config(kv_layout="xtensor"), machine, specs, torch.float32) == num_bytes


def test_the_device_s_own_blocks_hold_no_sequence(backend: Backend, specs: Specs) -> None:
    tight = make_config(num_kv_blocks=None, kv_cache_memory_bytes=16 * BLOCK_BYTES)
    assert plan_num_blocks(tight, device(backend), specs, torch.float32) == 16
    with pytest.raises(ConfigError, match=r"is 14 blocks; max_model_len 112 would fit"):
        plan_num_blocks(tight, device(backend, num_reserved=2), specs, torch.float32)


@pytest.mark.parametrize(("settings", "words"), [
    ({"num_kv_blocks": 15}, ["max_model_len 128 needs 16 KV blocks", "num_kv_blocks is 15", "max_model_len 120"]),
    ({"num_kv_blocks": None, "kv_cache_memory_bytes": 5 * BLOCK_BYTES}, [f"kv_cache_memory_bytes is {5 * BLOCK_BYTES}",
                                                                         "max_model_len 40"]),
    ({"num_kv_blocks": None}, ["gpu_memory_utilization 0.9", "is 4 blocks", "max_model_len 32"]),
], ids=str)
def test_too_few(backend: Backend, specs: Specs, settings: dict[str, Any], words: list[str]) -> None:
    machine = device(backend, memory_bytes=10 * BLOCK_BYTES)
    with pytest.raises(ConfigError) as error:
        plan_num_blocks(make_config(**settings), machine, specs, torch.float32)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(("name", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_dtype_that_is_set(backend: Backend, model_config: ModelConfig, name: str, dtype: torch.dtype) -> None:
    assert compute_dtype(make_config(dtype=name), backend, model_config) == dtype


def test_dtype_auto_asks_the_device(backend: Backend, model_config: ModelConfig) -> None:
    assert compute_dtype(make_config(dtype="auto"), backend, model_config) == backend.default_dtype(torch.float32)


@pytest.mark.parametrize(("name", "dtype", "num_bytes"), [("auto", torch.float32, 4.0), ("int8", torch.int8, 1.25),
                                                          ("fp8", torch.float8_e4m3fn, 1.0625),
                                                          ("fp8_e4m3", torch.float8_e4m3fn, 1.0625)])
def test_kv_dtype_that_is_set(backend: Backend, model_config: ModelConfig, specs: Specs, name: str,
                              dtype: torch.dtype, num_bytes: float) -> None:
    """A scale takes 4 bytes, or one, beside each 16 numbers."""
    assert cache_dtype(make_config(kv_cache_dtype=name), backend, model_config) is dtype
    assert block_bytes(backend, specs, 8, dtype) == BLOCK_BYTES / 4 * num_bytes
    cache = KVCache(backend, specs, num_blocks=5, block_size=8, dtype=dtype)
    assert sum(t.nbytes for layer in cache.layers for t in layer) == 5 * BLOCK_BYTES / 4 * num_bytes


def test_kv_dtypes_that_cannot_be(backend: Backend, model_config: ModelConfig) -> None:
    plain: Any = SimpleNamespace(name="plain", kv_dtypes=())
    with pytest.raises(ConfigError, match="kv_cache_dtype fp8: on plain KV has the compute type"):
        cache_dtype(make_config(kv_cache_dtype="fp8"), plain, model_config)
    odd: Any = SimpleNamespace(kv_specs=(KVSpec(num_heads=2, widths=(16, 6)),))  # the values' heads alone
    with pytest.raises(ConfigError, match="block_size 5 times head_dim 6 must be a multiple of 4"):
        cache_dtype(make_config(kv_cache_dtype="int8", block_size=5), backend, odd)
    assert cache_dtype(make_config(kv_cache_dtype="fp8", block_size=5), backend, odd) is torch.float8_e4m3fn


def test_copy_blocks_copies_every_layer(backend: Backend, specs: Specs) -> None:
    cache = KVCache(backend, specs, num_blocks=6, block_size=8, dtype=torch.float32)
    for i, tensor in enumerate(t for layer in cache.layers for t in layer):
        tensor.copy_(torch.arange(6).view(6, 1, 1, 1).expand_as(tensor) + 10 * i)
    cache.copy_blocks(np.array([1, 5], dtype=np.int32), np.array([0, 3], dtype=np.int32))
    for i, tensor in enumerate(t for layer in cache.layers for t in layer):
        assert (tensor.flatten(1) - 10 * i).mean(dim=1).tolist() == [1, 1, 2, 5, 4, 5]
