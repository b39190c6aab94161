"""Builds the KV tiers below the device, as an engine's settings ask for."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from xllm.config import CacheSettings, EngineConfig
from xllm.engine.executor import Executor
from xllm.errors import ConfigError
from xllm.kv.disk import DiskStore
from xllm.kv.eviction import make_policy
from xllm.kv.lanes import ThreadLanes
from xllm.kv.moves import LOAD, READ, SAVE, WRITE
from xllm.kv.performer import MovePerformer
from xllm.kv.prefetch import Prefetcher
from xllm.kv.tiers import TieredStore
from xllm.scheduler.scheduler import Scheduler
from xllm.sizes import is_zero, resolve_amount

if TYPE_CHECKING:
    from backends.backend import Backend
    from xllm.models.config import ModelConfig
    from xllm.runner.kv_codec import KVCodec
    from xllm.runner.model_runner import ModelRunner

_log = logging.getLogger(__name__)


def has_tiers(cache: CacheSettings) -> bool:
    """Whether anything is to stand below the device."""
    return cache.host_blocks_factor > 0 or not is_zero("host_cache_size", cache.host_cache_size)


def attach_tiers(scheduler: Scheduler, executor: Executor, config: EngineConfig, runner: ModelRunner,
                 backend: Backend, path: Path, model_config: ModelConfig) -> MovePerformer:
    """Put host memory, and disk if asked for, below the scheduler's KV manager; returns who moves the bytes.

    Raises ConfigError: a size is too small for one block, or another process owns the folder. DiskError: the disk
    cannot be used.
    """
    from xllm.runner.kv_codec import KVCodec
    from xllm.runner.mover import HostMover, Populator

    cache = config.cache
    codec = KVCodec.for_cache(cache.kv_store_dtype, runner.kv_cache.layers, backend.ops)
    num_slots = _num_host_slots(cache, backend, codec.payload_bytes, runner.kv_cache.num_blocks)
    mover = HostMover(backend, runner.kv_cache, codec, num_slots)
    store = _open_disk(config, codec, path, backend, model_config)
    host_rate = float(resolve_amount("host_bytes_per_s", cache.host_bytes_per_s, 0))
    disk_rate = float(resolve_amount("disk_bytes_per_s", cache.disk_bytes_per_s, 0))
    performer = MovePerformer(mover, store, runner.board)
    # On a CPU the cores that copy are the cores that compute.
    lanes = ThreadLanes(performer, {SAVE: host_rate, LOAD: host_rate, WRITE: disk_rate, READ: disk_rate},
                        rides=backend.device.type == "cpu")
    executor.riders = lanes
    facts = performer.facts()
    tiers = scheduler.kv.attach(lambda index, pool: TieredStore(
        index, pool, facts, lanes,
        lambda n: make_policy(cache.eviction_policy, n, lru_k=cache.lru_k, history=cache.eviction_history), _disk_lost))
    lanes.on_close = Populator(mover, lambda: lanes.foreground).stop
    if cache.kv_prefetch:
        tiers.prefetcher = Prefetcher(tiers)
    _log.info("KV tiers: %d blocks on the device, %d in host memory (%s), %d on disk, %d of them found there",
              scheduler.kv.num_blocks, num_slots, codec.name, facts.num_disk_slots,
              len(tiers.disk) if tiers.disk else 0)
    return performer


def _num_host_slots(cache: CacheSettings, backend: Backend, payload_bytes: int, num_blocks: int) -> int:
    if cache.host_blocks_factor > 0:
        num_slots = int(cache.host_blocks_factor * num_blocks)
    else:
        available = backend.available_host_bytes()
        num_slots = resolve_amount("host_cache_size", cache.host_cache_size, available) // payload_bytes
        if num_slots * payload_bytes > available:
            raise ConfigError(f"host_cache_size {cache.host_cache_size} is more than the {available} bytes available")
    if num_slots < 1:
        raise ConfigError(f"host_cache_size must hold at least one KV block of {payload_bytes} bytes")
    return num_slots


def _open_disk(config: EngineConfig, codec: KVCodec, path: Path, backend: Backend,
               model_config: ModelConfig) -> DiskStore | None:
    from xllm.models.fingerprint import fingerprint

    cache = config.cache
    if cache.disk_cache_dir is None:
        return None
    folder = Path(cache.disk_cache_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise ConfigError(f"disk_cache_dir cannot be used: {error}") from error
    capacity = resolve_amount("disk_cache_size", cache.disk_cache_size, free)
    mark = fingerprint(path, backend=backend.name, stored=codec.name, block_size=cache.block_size,
                       quantization=config.model.quantization, dtype=str(codec.cache_dtype))
    return DiskStore(folder, fingerprint=mark, payload_bytes=codec.payload_bytes, capacity_bytes=capacity)


def _disk_lost(message: str) -> None:
    _log.error("the disk tier of the KV cache failed and is switched off; serving goes on without it: %s", message)
