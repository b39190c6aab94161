"""Measures copies of KV between the device and host memory, of several sizes."""

from __future__ import annotations

import dataclasses

import numpy as np

from xllm.config import CacheSettings, EngineConfig, LoraSettings
from xllm.cost.observations import LOAD, SAVE, MeasuredMove
from xllm.engine.core import EngineCore
from xllm.errors import DeviceError
from xllm.kv.moves import URGENT, MoveDone
from xllm.kv.tiers import TieredStore

SIZES = (1, 2, 4, 8, 16, 32, 64, 128)  # blocks of a move; chosen: the last is 256 MiB of a model of 7 billion weights
LONGEST_BLOCKS = 32  # of a sequence of the engine that is made for it: none is computed
MOVES = 3  # of each size, both ways, in a round
TIMEOUT_S = 60.0  # of one move. Chosen: a disk that swaps may take that long, and nothing else
SizedMoves = dict[int, list[MeasuredMove]]  # by bytes


def measure_moves(config: EngineConfig, cache: CacheSettings, rounds: int) -> SizedMoves:
    """Copy blocks to host memory and back. config: resolved; cache: as it was asked for.

    A second engine does it, with random weights, as none are used, and as much host memory as the copies need: copies
    beside steps would disturb them.
    """
    core = EngineCore(_for_moves(config, cache))
    try:
        store = core.scheduler.kv.source
        assert isinstance(store, TieredStore), "as _for_moves has it"
        first, measured = core.scheduler.kv.num_blocks - SIZES[-1], SizedMoves()
        for turn in range(rounds + 1):  # the first one warms up
            for num_blocks in SIZES * MOVES:
                for kind in (SAVE, LOAD):
                    move = _move(store, kind, first, num_blocks)
                    if turn:
                        measured.setdefault(int(move.num_bytes), []).append(move)
        return measured
    finally:
        core.shutdown()


def _for_moves(config: EngineConfig, cache: CacheSettings) -> EngineConfig:
    assert config.model.max_model_len and config.cache.block_size, "resolved"
    length = min(config.model.max_model_len, LONGEST_BLOCKS * config.cache.block_size)
    return dataclasses.replace(
        config, lora=LoraSettings(),
        model=dataclasses.replace(config.model, load_format="dummy", max_model_len=length, quantization=None),
        cache=dataclasses.replace(config.cache, enable_prefix_caching=True, kv_layout="paged",
                                  kv_store_dtype=cache.kv_store_dtype, kv_cache_memory_bytes=None,
                                  num_kv_blocks=SIZES[-1] + LONGEST_BLOCKS, host_blocks_factor=1.0),
        scheduler=dataclasses.replace(config.scheduler, max_num_seqs=1))


def _move(store: TieredStore, kind: str, first: int, num_blocks: int) -> MeasuredMove:
    """One move, awaited. first: the device's block where it begins."""
    ended: list[MoveDone] = []
    blocks, slots = (np.arange(num_blocks, dtype=np.int32) + start for start in (first, 0))
    sources, targets = (blocks, slots) if kind == SAVE else (slots, blocks)
    store.moves.submit(kind, URGENT, sources, targets, ended.append)
    if not ended and store.moves.wait(TIMEOUT_S):
        store.moves.poll()
    if not ended:
        raise DeviceError(f"a copy of {num_blocks} KV blocks did not end within {TIMEOUT_S:g} s")
    if (error := ended[0].error) is not None:
        raise DeviceError(f"KV could not be copied: {error.message}")
    return MeasuredMove(kind, num_blocks * store.moves.payload_bytes, ended[0].busy_s)
