"""A decoder of its own of KV events: the structs that vLLM documents for subscribers (docs.vllm.ai, "KV Events
Subscriber"), declared anew. It has nothing of `event_wire.py`."""

from __future__ import annotations

from typing import Any

import msgspec


class KVCacheEvent(msgspec.Struct, array_like=True, omit_defaults=True, gc=False, tag=True):
    pass


class BlockStored(KVCacheEvent):
    block_hashes: list[bytes | int]
    parent_block_hash: bytes | int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[tuple[Any, ...] | None] | None = None
    group_idx: int | None = None


class ShortBlockStored(KVCacheEvent, tag="BlockStored"):
    """As it was before `extra_keys` came."""

    block_hashes: list[bytes | int]
    parent_block_hash: bytes | int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None


class BlockRemoved(KVCacheEvent):
    block_hashes: list[bytes | int]
    medium: str | None
    group_idx: int | None = None


class AllBlocksCleared(KVCacheEvent):
    pass


class EventBatch(msgspec.Struct, array_like=True, omit_defaults=True, gc=False):
    ts: float
    events: list[Any]
    data_parallel_rank: int | None = None


class KVEventBatch(EventBatch):
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]


class KVCacheMapEvent(msgspec.Struct, omit_defaults=True, gc=False, tag=lambda name: name.removeprefix("Map")):
    """Of vLLM 0.33, whose events are maps; the batch is an array still."""


class MapBlockStored(KVCacheMapEvent):
    block_hashes: list[bytes | int]
    parent_block_hash: bytes | int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[tuple[Any, ...] | None] | None = None
    group_idx: int | None = None
    locality: str | None = None


class MapBlockRemoved(KVCacheMapEvent):
    block_hashes: list[bytes | int]
    medium: str | None
    group_idx: int | None = None
    locality: str | None = None


class MapAllBlocksCleared(KVCacheMapEvent):
    pass


class KVEventMapBatch(EventBatch):
    events: list[MapBlockStored | MapBlockRemoved | MapAllBlocksCleared]


DECODER = msgspec.msgpack.Decoder(KVEventBatch)
MAP_DECODER = msgspec.msgpack.Decoder(KVEventMapBatch)
ENCODER = msgspec.msgpack.Encoder()
