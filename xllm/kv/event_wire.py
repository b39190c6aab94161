"""Events of a KV cache as other engines and routers write and read them (vLLM's `KVEventBatch`): msgpack arrays.

A message has three frames: the topic, the sequence number in 8 bytes (big-endian), and the batch
`[ts, [event, ...], data_parallel_rank]`. An event is an array that begins with its name; in vLLM 0.33 a map, whose
`type` is that. Both are read and, as the setting says, written. Members that are not known here are ignored.

Block hashes are numbers of 64 bits: of ours, the low half of the digest (`block.py`), big-endian; vLLM's come as such
numbers, or whole as bytes, of which the last eight are that number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from xllm.kv.block import TIERS

END = (2**64 - 1).to_bytes(8, "big")  # the sequence number behind the last batch of a replay: -1
MEDIA = ("GPU", "CPU", "DISK")  # of the tiers: what vLLM calls the first two, and Dynamo the third
# What routers and engines call them (vLLM, SGLang, Dynamo's `StorageTier`); an event that names none is of the device.
_TIER_OF_MEDIUM = {None: 0, "GPU": 0, "DEVICE": 0, "CPU": 1, "CPU_PINNED": 1, "CPU_TIER1": 1, "DISK": 2, "NVME": 2,
                   "STORAGE": 2, "CPU_TIER2": 2}
assert len(MEDIA) == len(TIERS)

# Of our sequence numbers: the bits below the time at which the instance was started. 2^32 steps of a millisecond are 49
# days; what comes then has the number of a later start, and costs readers one replay.
INCARNATION_SHIFT = 32
Hash = int | bytes


class BlockStored(msgspec.Struct, array_like=True, tag=True, gc=False):
    """A chain of blocks can be found now. token_ids: of all of them, or none where they are not published. extra_keys:
    what went into each block's hash beside tokens, such as a salt. group_idx: of layers that share block tables."""

    block_hashes: list[Hash]
    parent_block_hash: Hash | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: list[Any] | None = None
    group_idx: int | None = None


class BlockRemoved(msgspec.Struct, array_like=True, tag=True, gc=False):
    """Blocks cannot be found any more in this medium."""

    block_hashes: list[Hash]
    medium: str | None = None
    group_idx: int | None = None


class AllBlocksCleared(msgspec.Struct, array_like=True, tag=True, gc=False):
    """There is no block any more in any medium."""


KVEvent = BlockStored | BlockRemoved | AllBlocksCleared
Written = tuple[Any, ...]  # an event as it is written: its name, and its members as far as every reader knows them


class EventBatch(msgspec.Struct, array_like=True, gc=False):
    """ts: seconds since 1970."""

    ts: float
    events: list[KVEvent]
    data_parallel_rank: int | None = None


_BATCH = msgspec.msgpack.Decoder(EventBatch)
_ANYTHING = msgspec.msgpack.Decoder()
_KINDS: dict[str, type[msgspec.Struct]] = {kind.__name__: kind for kind in (BlockStored, BlockRemoved,
                                                                          AllBlocksCleared)}
_encode = msgspec.msgpack.Encoder().encode
CLEARED: Written = ("AllBlocksCleared",)


def stored(hashes: list[int], parent: int | None, token_ids: list[int], block_size: int, tier: int) -> Written:
    """A chain of our blocks, of no adapter."""
    return "BlockStored", hashes, parent, token_ids, block_size, None, MEDIA[tier], None


def removed(hashes: list[int], tier: int) -> Written:
    """Of our blocks."""
    return "BlockRemoved", hashes, MEDIA[tier]


def encode(ts: float, events: list[Written], data_parallel_rank: int, encoding: str = "array") -> bytes:
    """The payload of a batch. encoding: of events, array or map."""
    return _encode((ts, events if encoding == "array" else list(map(_as_map, events)), data_parallel_rank))


def _as_map(event: Written) -> dict[str, Any]:
    return dict(zip(("type", *_KINDS[event[0]].__struct_fields__), event))


def decode(payload: bytes) -> EventBatch:
    """The batch of a message. Raises msgspec.DecodeError for what is none."""
    try:
        return _BATCH.decode(payload)
    except msgspec.ValidationError:
        return _from_maps(_any(payload))
    except (UnicodeDecodeError, RecursionError) as error:  # a name that is no text; arrays in arrays
        raise msgspec.DecodeError(str(error)) from None


def _any(payload: bytes) -> Any:
    try:
        return _ANYTHING.decode(payload)
    except (UnicodeDecodeError, RecursionError, TypeError) as error:  # TypeError: an array as a key
        raise msgspec.DecodeError(str(error)) from None


def _from_maps(batch: Any) -> EventBatch:
    if isinstance(batch, dict):
        batch = [batch.get(name) for name in EventBatch.__struct_fields__]
    if not isinstance(batch, list) or len(batch) < 2 or not isinstance(batch[1], list):
        raise msgspec.ValidationError("a batch is an array of ts, events and rank, or a map of them")
    return msgspec.convert([batch[0], list(map(_as_array, batch[1])), *batch[2:]], EventBatch)


def _as_array(event: Any) -> list[Any]:
    kind = _KINDS.get(str(event.get("type"))) if isinstance(event, dict) else None
    if kind is None:
        raise msgspec.ValidationError("no such event")
    fields = msgspec.structs.fields(kind)
    return [kind.__name__, *(event.get(field.name, None if field.required else field.default) for field in fields)]


def tier_of(medium: str | None) -> int | None:
    """The place of a medium in `TIERS`; None: one that no instance can load from alone, or that is not known."""
    return _TIER_OF_MEDIUM.get(medium if medium is None else medium.upper())


def number_of(block_hash: Hash) -> int:
    """A hash as its number of 64 bits. Of our digests, too."""
    if isinstance(block_hash, bytes):
        return int.from_bytes(block_hash[-8:], "big")
    return block_hash % 2**64


def message(topic: bytes, number: int, payload: bytes) -> tuple[bytes, bytes, bytes]:
    """The frames that a PUB socket sends."""
    return topic, number.to_bytes(8, "big"), payload


def sequence_number(frames: Sequence[bytes], *num_frames: int) -> int | None:
    """The number in the last but one of frames, of which there are so many; None: they are no message."""
    if len(frames) not in num_frames or len(frames[-2]) != 8:
        return None
    return int.from_bytes(frames[-2], "big")
