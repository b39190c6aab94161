"""The KV tensors of a model, and how many blocks of them to make.

The model says what a block holds (`KVSpec`). The axis order belongs to the backend; nothing above this file knows it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from backends.backend import Backend
from backends.reference.kv_codes import QUANTISED, row_width
from backends.vmm import VmmDriver
from xllm.config import EngineConfig
from xllm.errors import ConfigError
from xllm.models.kv_spec import KVSpec
from xllm.models.model_config import ModelConfig
from xllm.runner.arena import Arena, Region, padded_bytes
from xllm.sizes import size_text


def compute_dtype(config: EngineConfig, backend: Backend, model_config: ModelConfig) -> torch.dtype:
    """The dtype of weights, activations and KV: the one that is set, or the device's best for the checkpoint.

    Raises ConfigError if the device does not have it.
    """
    if config.model.dtype == "auto":
        return backend.default_dtype(getattr(torch, model_config.checkpoint_dtype))
    dtype: torch.dtype = getattr(torch, config.model.dtype)
    if dtype not in backend.dtypes:
        known = " or ".join(str(each).removeprefix("torch.") for each in backend.dtypes)
        raise ConfigError(f"dtype {config.model.dtype}: {backend.name} runs in {known}")
    return dtype


def cache_dtype(config: EngineConfig, backend: Backend, model_config: ModelConfig) -> torch.dtype:
    """The dtype of the KV cache: `compute_dtype`, or the one of one byte that `kv_cache_dtype` names.

    Raises ConfigError if the device's attention does not read it.
    """
    name = config.cache.kv_cache_dtype
    if name == "auto":
        return compute_dtype(config, backend, model_config)
    dtype = next(dtype for dtype, format in QUANTISED.items() if format == name.removesuffix("_e4m3"))
    if dtype not in backend.kv_dtypes:
        raise ConfigError(f"kv_cache_dtype {name}: on {backend.name} KV has the compute type")
    assert config.cache.block_size is not None, "resolve() first"
    for width in sorted({width for spec in model_config.kv_specs for width in spec.widths}):
        if dtype is torch.int8 and config.cache.block_size * width % 4:
            raise ConfigError(f"kv_cache_dtype int8: block_size {config.cache.block_size} times head_dim {width} must "
                              "be a multiple of 4, where the scales can begin")
    return dtype


class KVCache:
    """A tensor for each part of each layer: `layers[i]` is (k, v), or (latent,), or where the device
    lays them apart (latent, rotated part). The model writes them during forward.

    Their first axis is the block. With an arena they are views of its pages: the first `num_blocks` are the blocks,
    as without one, and no other may be touched unless the arena maps it.
    """

    def __init__(self, backend: Backend, kv_specs: Sequence[KVSpec], *, num_blocks: int, block_size: int,
                 dtype: torch.dtype, arena: Arena | None = None):
        self._backend = backend
        self._arena = arena  # not every device's tensors keep it alive
        self.num_blocks = num_blocks
        shapes = _block_shapes(backend, kv_specs, block_size, dtype)
        self.layers: list[tuple[Tensor, ...]]
        if arena is not None:
            self.layers = arena.layers(shapes, dtype)
            return
        self.layers = [tuple(backend.allocate_kv_cache((num_blocks, *shape), dtype) for shape in parts)
                       for parts in shapes]

    def copy_blocks(self, src_B: np.ndarray, dst_B: np.ndarray) -> None:
        """Copy whole blocks in every layer. src and dst are disjoint, dst has no repeats."""
        if not len(src_B):
            return
        src = torch.from_numpy(src_B.astype(np.int64)).to(self._backend.device)
        dst = torch.from_numpy(dst_B.astype(np.int64)).to(self._backend.device)
        for layer in self.layers:
            for cache in layer:
                self._backend.ops.copy_blocks(cache, src, dst)


def _block_shapes(backend: Backend, kv_specs: Sequence[KVSpec], block_size: int,
                  dtype: torch.dtype) -> list[list[tuple[int, ...]]]:
    """By layer and part: the shape of one block, with room for the scales of a quantised cache."""
    return [[shape[1:] for shape in _part_shapes(backend, spec, block_size, dtype)] for spec in kv_specs]


def _part_shapes(backend: Backend, spec: KVSpec, block_size: int, dtype: torch.dtype) -> Sequence[tuple[int, ...]]:
    if spec.rotated_width:
        latent_width = spec.widths[0] - spec.rotated_width
        return backend.latent_cache_shapes(1, block_size, latent_width, spec.rotated_width, dtype)
    return [backend.kv_cache_shape(1, block_size, spec.num_heads, row_width(width, dtype)) for width in spec.widths]


def _part_bytes(backend: Backend, kv_specs: Sequence[KVSpec], block_size: int, dtype: torch.dtype) -> list[int]:
    shapes = _block_shapes(backend, kv_specs, block_size, dtype)
    return [math.prod(shape) * dtype.itemsize for parts in shapes for shape in parts]


def block_bytes(backend: Backend, kv_specs: Sequence[KVSpec], block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block: all parts of all layers, with the scales of a quantised cache."""
    return sum(_part_bytes(backend, kv_specs, block_size, dtype))


def page_bytes(config: EngineConfig, backend: Backend, kv_specs: Sequence[KVSpec], dtype: torch.dtype) -> int:
    """Bytes that a block takes under a resolved config: with the xtensor layout, whole pages of the device."""
    return sum(region.page_bytes for region in page_regions(config, backend, kv_specs, dtype))


def page_regions(config: EngineConfig, backend: Backend, kv_specs: Sequence[KVSpec],
                 dtype: torch.dtype) -> list[Region]:
    """How a block lies under a resolved config: with the xtensor layout in pages of the device, whose regions the arena
    takes; else one after the other."""
    assert config.cache.block_size is not None, "resolve() first"
    sizes = _part_bytes(backend, kv_specs, config.cache.block_size, dtype)
    size = sum(sizes)
    if config.cache.kv_layout == "xtensor" and backend.vmm is not None:
        if backend.dense_kv and all(spec.rotated_width for spec in kv_specs):
            return _regions_of_parts(backend, backend.vmm, kv_specs, config.cache.block_size, dtype)
        size = padded_bytes(size, backend.vmm, math.lcm(*sizes) if backend.dense_kv else 1)
    return [Region.dense(size)]


def _regions_of_parts(backend: Backend, driver: VmmDriver, kv_specs: Sequence[KVSpec], block_size: int,
                      dtype: torch.dtype) -> list[Region]:
    """A latent and its rotated part, which differ in size and are found by one number: from page to page there are as
    many blocks of the one as of the other, though fewer are there. Addresses cost nothing."""
    layers = [[math.prod(shape) * dtype.itemsize for shape in parts]
              for parts in _block_shapes(backend, kv_specs, block_size, dtype)]
    by_part = list(zip(*layers, strict=True))
    assert all(len(set(sizes)) == 1 for sizes in by_part), "layers of one model have latents of one width"
    whole = math.lcm(*(driver.granularity_bytes // math.gcd(driver.granularity_bytes, sizes[0]) for sizes in by_part))
    num_blocks = -(-len(layers) // whole) * whole
    return [Region(padded_bytes(sum(sizes), driver), num_blocks * sizes[0]) for sizes in by_part]


def workers_in_memory(config: EngineConfig, backend: Backend) -> int:
    """How many workers live in the memory that `backend` reports: all of the machine's, or where a rank that shares a
    model has a device of its own, those that compute all of it."""
    return config.workers_a_node if backend.computes_on_host else config.device.worker_ranks


def plan_num_blocks(config: EngineConfig, backend: Backend, kv_specs: Sequence[KVSpec], dtype: torch.dtype, *,
                    others_bytes: int = 0) -> int:
    """How many KV blocks of this dtype to allocate under a resolved config.

    The first that is set counts: num_kv_blocks, kv_cache_memory_bytes, a share of available memory. The
    share is capped at what max_num_seqs sequences of max_model_len can hold at once (and one block). The device's own
    blocks (`Backend.num_reserved_blocks`) are among them, beside those of num_kv_blocks. others_bytes: what weights and
    steps will take that is still available now.

    Raises:
        ConfigError: not even one sequence of max_model_len fits, or the device has no such cache.
    """
    cache, max_model_len, num_reserved = config.cache, config.model.max_model_len, backend.num_reserved_blocks
    assert cache.block_size is not None, "resolve() first"
    assert max_model_len is not None, "resolve() first"
    blocks_per_sequence = -(-max_model_len // cache.block_size)
    try:
        bytes_per_block = page_bytes(config, backend, kv_specs, dtype)
    except ValueError as error:
        raise ConfigError(f"block_size {cache.block_size}: {error}") from None
    if cache.num_kv_blocks is not None:
        num_blocks, origin = cache.num_kv_blocks + num_reserved, f"num_kv_blocks is {cache.num_kv_blocks}"
    elif cache.kv_cache_memory_bytes is not None:
        num_blocks = cache.kv_cache_memory_bytes // bytes_per_block
        origin = f"kv_cache_memory_bytes is {cache.kv_cache_memory_bytes}"
    else:
        usable = _memory_share_bytes(config, backend, others_bytes)
        most = config.scheduler.max_num_seqs * blocks_per_sequence + 1 + num_reserved
        num_blocks = min(usable // bytes_per_block, most)
        origin = f"gpu_memory_utilization {cache.gpu_memory_utilization} leaves {usable} bytes"
        if others_bytes:
            origin += f" beside {size_text(others_bytes)} for weights and steps"
    num_usable = max(0, num_blocks - num_reserved)
    if num_usable < blocks_per_sequence:
        raise ConfigError(
            f"one sequence of max_model_len {max_model_len} needs {blocks_per_sequence} KV blocks "
            f"({blocks_per_sequence * bytes_per_block} bytes), but {origin}, which is {num_usable} blocks; "
            + (f"max_model_len {num_usable * cache.block_size} would fit" if num_usable else
               "not even a short sequence would fit: lower max_num_batched_tokens, quantise, or free memory")
        )
    return num_blocks


def _memory_share_bytes(config: EngineConfig, backend: Backend, others_bytes: int) -> int:
    """Workers that live in the same memory take an equal part each, and each has weights of its own."""
    share = config.cache.gpu_memory_utilization * backend.kv_memory_share
    num_workers = workers_in_memory(config, backend)
    return int(max(0, backend.available_memory_bytes() - num_workers * others_bytes) * share) // num_workers
