"""`MemoryPlan`: what a worker's memory goes to: weights, the longest step, and KV blocks."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from backends.backend import Backend
from xllm.config import EngineConfig
from xllm.errors import ConfigError
from xllm.layers.experts import MAX_ROWS
from xllm.models.footprint import Footprint, footprint, weight_shapes
from xllm.models.fp8_format import Fp8Format
from xllm.models.model_config import ModelConfig
from xllm.runner.kv_cache import page_bytes, plan_num_blocks, workers_in_memory
from xllm.sizes import size_text

_log = logging.getLogger("xllm.worker.loading")


class MemoryPlan:
    """config: resolved. path: the checkpoint's folder. dtype, kv_dtype: of weights and of the KV cache. kept: the form
    of the checkpoint's fp8 where products keep it. Raises ModelError where there are no weights to read.

    need: what weights and steps take, estimated.
    """

    def __init__(self, config: EngineConfig, backend: Backend, path: Path, model_config: ModelConfig, *,
                 dtype: torch.dtype, kv_dtype: torch.dtype, kept: Fp8Format | None):
        num_shares = config.device.tensor_parallel_size
        self._config, self._backend, self._dtype, self._kv_dtype = config, backend, dtype, kv_dtype
        self._quantization = "fp8" if kept else config.model.quantization
        self._num_workers = workers_in_memory(config, backend)
        self._kv_specs = tuple(spec.on_one_of(num_shares) for spec in model_config.kv_specs)
        self.need = _footprint(config, backend, path, model_config, dtype, kept)

    @property
    def block_bytes(self) -> int:
        """Of a KV block, with the layout's padding."""
        return page_bytes(self._config, self._backend, self._kv_specs, self._kv_dtype)

    def check(self) -> None:
        """Before the weights are read, raise ConfigError if the system would end this process, or the device refuse,
        while they are, or if no sequence would have room beside them."""
        need, num_workers, free = self.need, self._num_workers, self._backend.available_memory_bytes()
        if (need.weights + need.loading) * num_workers > free:
            advice = "" if self._quantization else (
                "quantise them (--quantization int8 takes about a quarter of float32), ")
            raise ConfigError(
                f"the weights take {size_text(need.weights)} as "
                f"{self._quantization or str(self._dtype).removeprefix('torch.')}"
                + (f" in each of {num_workers} workers" if num_workers > 1 else "")
                + f", and {size_text(need.loading)} more while they are read, but {size_text(free)} of memory is "
                f"available (of the machine, or within this process's limits): {advice}take a smaller model, or free "
                "memory")
        self._count_blocks(self._config, need.weights + need.steps)

    def num_blocks(self, config: EngineConfig) -> int:
        """How many KV blocks to make, now that the weights have been read. config: as all ranks have it. Raises
        ConfigError. Warns if a cache of that size could outgrow memory: it takes its memory only as it fills."""
        number = self._count_blocks(config, self.need.steps)
        num_workers, free, steps = self._num_workers, self._backend.available_memory_bytes(), self.need.steps
        kv_bytes = number * self.block_bytes
        if (kv_bytes + steps) * num_workers > free:
            _log.warning("the KV cache may take %s and a step %s, but %s of memory is available: as the cache fills "
                         "up, the system may end this process. Lower --num-kv-blocks or --kv-cache-memory-bytes",
                         size_text(kv_bytes * num_workers), size_text(steps * num_workers), size_text(free))
        return number

    def _count_blocks(self, config: EngineConfig, others_bytes: int) -> int:
        return plan_num_blocks(config, self._backend, self._kv_specs, self._kv_dtype, others_bytes=others_bytes)


def _footprint(config: EngineConfig, backend: Backend, path: Path, model_config: ModelConfig, dtype: torch.dtype,
               kept: Fp8Format | None) -> Footprint:
    """Estimate the memory that weights and steps take. Random weights have no files to look at: theirs count as 0."""
    model, scheduler = config.model, config.scheduler
    if model.load_format == "dummy":
        return Footprint(0)
    num_tokens, max_len = scheduler.max_num_batched_tokens, model.max_model_len
    assert num_tokens is not None and max_len is not None, "a resolved config says it"
    num_shares = config.device.tensor_parallel_size
    attention_bytes = model_config.attention_bytes(
        backend, num_tokens=num_tokens, longest=max_len, num_positions=scheduler.max_num_seqs * max_len,
        num_shares=num_shares, itemsize=dtype.itemsize)
    return footprint(weight_shapes(path), dtype, None if kept else model.quantization, kept=kept, num_tokens=num_tokens,
                     num_rows=scheduler.max_num_seqs, num_shares=num_shares,
                     expert_rows=min(MAX_ROWS, num_tokens * model_config.experts_a_token),
                     attention_bytes=attention_bytes)
