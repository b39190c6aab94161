"""`WorkerTiers`: a worker's KV tiers below its device: host memory and, if the settings ask for it, disk and a shared
store.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from xllm.config import CacheSettings
from xllm.errors import ConfigError
from xllm.kv.disk import DiskStore
from xllm.kv.disk_seal import Seal, read_key
from xllm.kv.lanes import ThreadLanes
from xllm.kv.moves import LOAD, READ, SAVE, TRANSFERS, WRITE, Move, MoveDone, TierFacts
from xllm.kv.performer import MovePerformer
from xllm.kv.shared_store import SharedStore
from xllm.kv.store_key import store_seal
from xllm.models.fingerprint import fingerprint
from xllm.private_files import open_private_folder
from xllm.runner.host_mover import HostMover, Populator
from xllm.runner.kv_codec import KVCodec
from xllm.runner.model_runner import ModelRunner
from xllm.sizes import resolve_amount
from xllm.worker.loading import LoadedModel

if TYPE_CHECKING:
    from xllm.worker.worker_transfers import WorkerTransfers


class WorkerTiers:
    """Performs moves in threads of its own (`kv/lanes.py`); calls `report` with each that has ended.

    Raises ConfigError: a size is too small for one block, or another process owns the folder. DiskError: the disk or
    the shared store cannot be used.
    """

    def __init__(self, model: LoadedModel, runner: ModelRunner, report: Callable[[MoveDone], None], *, rank: int = 0):
        cache, backend = model.config.cache, model.backend
        codec = KVCodec.for_cache(cache.kv_store_dtype, runner.kv_cache.layers, backend.ops)
        num_slots = _num_host_slots(model, codec.payload_bytes)
        self.transfers: WorkerTransfers | None = None
        if model.config.transfer.enable_disagg_pd:
            from xllm.worker.worker_transfers import WorkerTransfers  # needs zmq

            self.transfers = WorkerTransfers(model, runner, codec, num_slots, report, rank=rank)
        memory = None if self.transfers is None else self.transfers.memory
        mover = HostMover(backend, runner.kv_cache, codec, num_slots, memory)
        self.performer = MovePerformer(mover, _open_disk(model, codec, rank), runner.board,
                                       _open_shared(model, codec, rank))
        self.facts: TierFacts = self.performer.facts()
        if self.transfers is not None:
            self.facts = replace(self.facts, windows=(self.transfers.window,))
        host_rate = float(resolve_amount("host_bytes_per_s", cache.host_bytes_per_s, 0))
        disk_rate = float(resolve_amount("disk_bytes_per_s", cache.disk_bytes_per_s, 0))
        self.lanes = ThreadLanes(self.performer, report,
                                 {SAVE: host_rate, LOAD: host_rate, WRITE: disk_rate, READ: disk_rate},
                                 rides=backend.computes_on_host)
        self._populator = Populator(mover, lambda: self.lanes.foreground)

    def send(self, move: Move) -> None:
        """Begin a move. The ticket that it waits for, or that waits for it, is open when this returns."""
        if move.lane in TRANSFERS:
            assert self.transfers is not None
            self.transfers.send(move)
        else:
            self.lanes.send(move)

    @property
    def missed_total(self) -> dict[str, dict[str, int]]:
        """Totals of reads that found no good block, by tier and reason."""
        return self.performer.missed_total

    def close(self) -> None:
        """Let running moves end, drop the queued ones, and release the disk's folder."""
        self._populator.stop()
        if self.transfers is not None:
            self.transfers.close()
        self.lanes.close()


def _num_host_slots(model: LoadedModel, payload_bytes: int) -> int:
    cache: CacheSettings = model.config.cache
    if cache.host_blocks_factor > 0:
        num_slots = int(cache.host_blocks_factor * model.num_blocks)
    else:
        available = model.backend.available_host_bytes() // model.config.workers_a_node
        num_slots = resolve_amount("host_cache_size", cache.host_cache_size, available) // payload_bytes
        if num_slots * payload_bytes > available:
            raise ConfigError(f"host_cache_size {cache.host_cache_size} is more than the {available} bytes available")
    if num_slots < 1:
        raise ConfigError(f"host_cache_size must hold at least one KV block of {payload_bytes} bytes")
    return num_slots


def _open_disk(model: LoadedModel, codec: KVCodec, rank: int) -> DiskStore | None:
    cache, num_ranks = model.config.cache, model.config.device.num_ranks
    if cache.disk_cache_dir is None:
        return None
    seal = Seal()
    if cache.disk_cache_key_file is not None:
        seal = Seal(read_key(Path(cache.disk_cache_key_file)), b"rank %d of %d" % (rank, num_ranks))
    folder = Path(cache.disk_cache_dir)
    try:
        os.close(open_private_folder(folder))
        if num_ranks > 1:  # each stores its own bytes
            folder /= f"rank-{rank}-of-{num_ranks}"
            os.close(open_private_folder(folder))
        free = shutil.disk_usage(folder).free // model.config.workers_a_node
    except OSError as error:
        raise ConfigError(f"disk_cache_dir cannot be used: {error}") from error
    capacity = resolve_amount("disk_cache_size", cache.disk_cache_size, free)
    mark = fingerprint(model.path, False, **_shaping(model, codec))
    return DiskStore(folder, fingerprint=mark, payload_bytes=codec.payload_bytes, capacity_bytes=capacity,
                     seal=seal)


def _open_shared(model: LoadedModel, codec: KVCodec, rank: int) -> SharedStore | None:
    cache, num_ranks = model.config.cache, model.config.device.num_ranks
    if cache.kv_store is None:
        return None
    folder = Path(cache.kv_store)
    try:
        os.close(open_private_folder(folder))
        free = shutil.disk_usage(folder).free // model.config.workers_a_node
    except OSError as error:
        raise ConfigError(f"kv_store cannot be used: {error}") from error
    mark = fingerprint(model.path, True, rank=f"{rank} of {num_ranks}", **_shaping(model, codec))
    return SharedStore(folder, fingerprint=mark, payload_bytes=codec.payload_bytes,
                       capacity_bytes=resolve_amount("kv_store_size", cache.kv_store_size, free),
                       seal=store_seal(cache, rank, num_ranks))


def _shaping(model: LoadedModel, codec: KVCodec) -> dict[str, str | int | None]:
    """The settings that shape a model's stored KV."""
    return {"backend": model.backend.name, "stored": codec.name, "block_size": model.config.cache.block_size,
            "quantization": model.config.model.quantization, "dtype": str(codec.cache_dtype), **_overrides(model)}


def _overrides(model: LoadedModel) -> dict[str, str]:
    """The settings that change how the checkpoint computes KV, those that are set only, as text."""
    settings = model.config.model
    size = model.parallel.tp.size  # whose ranks have other heads than those of as many ranks that compute everything
    said = {"hf_overrides": settings.hf_overrides, "rope_scaling": settings.rope_scaling,
            "tensor_parallel_size": str(size) if size > 1 else None}
    return {name: text for name, text in said.items() if text is not None}
