"""What is published of a KV cache: the bytes, as vLLM's documented structs read them, and what a replay brings."""

from __future__ import annotations

import contextlib
import random

import msgspec
import numpy as np
import pytest

from tests.kv import vllm_structs as vllm
from tests.kv.driver import Driver
from tests.kv.test_events import operate
from xllm.kv import event_wire
from xllm.kv.block import ROOT, TOKEN_DTYPE, block_digests
from xllm.kv.event_log import CacheEvents, KVEventLog
from xllm.kv.event_stream import KVEventStream

TOKENS = np.arange(100, 112, dtype=np.int32)
DIGESTS = block_digests(TOKENS, 4)
NUMBERS = [int.from_bytes(digest[-8:], "big") for digest in DIGESTS]


def chain(digests: list[bytes], parent: bytes = ROOT) -> dict[bytes, bytes]:
    return dict(zip(digests, [parent, *digests]))


def words(first: int) -> bytes:
    return TOKENS[4 * first : 4 * first + 4].astype(TOKEN_DTYPE).tobytes()


def test_vllms_structs_read_every_byte() -> None:
    stream = KVEventStream(4, 1000.0, buffer_steps=10, data_parallel_rank=2)
    tokens = {digest: words(place) for place, digest in enumerate(DIGESTS[:2])}
    first = stream.publish([CacheEvents(0, chain(DIGESTS[:2]), (), tokens)], 1001.5)
    second = stream.publish([CacheEvents(0, chain(DIGESTS[2:], DIGESTS[1]), [DIGESTS[0]]),
                             CacheEvents(1, chain(DIGESTS[:1]), ()), CacheEvents(2, {}, DIGESTS[1:])], 1002.0)
    assert [number for number, _ in (first, second)] == [1000 << 32, (1000 << 32) + 1]
    stored = [vllm.BlockStored(NUMBERS[:2], None, TOKENS[:8].tolist(), 4, None, "GPU", None)]
    assert vllm.DECODER.decode(first[1]) == vllm.KVEventBatch(1001.5, [vllm.AllBlocksCleared(), *stored], 2)
    assert vllm.DECODER.decode(second[1]) == vllm.KVEventBatch(1002.0, [
        vllm.BlockRemoved(NUMBERS[:1], "GPU"),
        vllm.BlockStored(NUMBERS[2:], NUMBERS[1], [], 4, None, "GPU", None),
        vllm.BlockStored(NUMBERS[:1], None, TOKENS[:4].tolist(), 4, None, "CPU", None),
        vllm.BlockRemoved(NUMBERS[1:], "DISK")], 2)
    plain = msgspec.msgpack.decode(first[1])
    assert plain == [1001.5, [["AllBlocksCleared"], ["BlockStored", NUMBERS[:2], None, TOKENS[:8].tolist(), 4, None,
                                                     "GPU", None]], 2]
    (event,) = stored
    short = vllm.ShortBlockStored(*(getattr(event, name) for name in vllm.ShortBlockStored.__struct_fields__))
    assert first[1] == vllm.ENCODER.encode(vllm.EventBatch(1001.5, [vllm.AllBlocksCleared(), short], 2)), (
        "not a byte differs from what vLLM's structs wrote before they had extra_keys")


def test_vllms_newer_structs_read_maps() -> None:
    """vLLM 0.33: a batch is an array, an event a map."""
    stream = KVEventStream(4, 1000.0, buffer_steps=10, encoding="map")
    tokens = {digest: words(place) for place, digest in enumerate(DIGESTS[:2])}
    stream.publish([CacheEvents(0, chain(DIGESTS[:2]), (), tokens)], 1001.5)
    _, payload = stream.publish([CacheEvents(1, chain(DIGESTS[2:], DIGESTS[1]), DIGESTS[:1])], 1002.0)
    ((_, snapshot),) = stream.replay(0)
    assert vllm.MAP_DECODER.decode(payload) == vllm.KVEventMapBatch(1002.0, [
        vllm.MapBlockRemoved(NUMBERS[:1], "CPU"),
        vllm.MapBlockStored(NUMBERS[2:], NUMBERS[1], [], 4, None, "CPU", None)], 0)
    assert vllm.MAP_DECODER.decode(snapshot).events[:2] == [
        vllm.MapAllBlocksCleared(), vllm.MapBlockStored(NUMBERS[:2], None, TOKENS[:8].tolist(), 4, None, "GPU", None)]
    with pytest.raises(msgspec.ValidationError):
        vllm.DECODER.decode(payload)
    stored = event_wire.decode(snapshot).events[1]
    assert isinstance(stored, event_wire.BlockStored) and stored.token_ids == TOKENS[:8].tolist()


@pytest.mark.parametrize("form", ["arrays", "maps in an array", "maps"])
def test_what_vllm_writes_is_read(form: str) -> None:
    stored = vllm.BlockStored([b"\1" * 32, 7], b"\2" * 32, [1, 2], 1, None, "GPU", None, [None, ("salt",)], 0)
    batch = vllm.KVEventBatch(5.0, [stored, vllm.BlockRemoved([9], "CPU"), vllm.AllBlocksCleared()], 3)
    payload = vllm.ENCODER.encode(batch)
    if form != "arrays":  # since 0.33, with members that are not known here
        events = [{"type": type(event).__name__, **{name: getattr(event, name) for name in event.__struct_fields__},
                   "locality": "LOCAL"} for event in batch.events]
        payload = msgspec.msgpack.encode([5.0, events, 3] if form == "maps in an array" else {
            "ts": 5.0, "events": events, "data_parallel_rank": 3, "more": 1})
    found = event_wire.decode(payload)
    assert (found.ts, found.data_parallel_rank) == (5.0, 3)
    first, second, third = found.events
    assert isinstance(first, event_wire.BlockStored) and isinstance(third, event_wire.AllBlocksCleared)
    assert [event_wire.number_of(block) for block in first.block_hashes] == [0x0101010101010101, 7]
    assert (first.token_ids, first.medium, list(first.extra_keys[1]), first.group_idx) == ([1, 2], "GPU", ["salt"], 0)
    assert isinstance(second, event_wire.BlockRemoved) and event_wire.tier_of(second.medium) == 1


def test_torn_frames_are_refused() -> None:
    _, payload = KVEventStream(4, 0.0, buffer_steps=1).publish([CacheEvents(0, chain(DIGESTS), ())], 0.0)
    for length in range(len(payload)):
        with pytest.raises(msgspec.DecodeError):
            event_wire.decode(payload[:length])
    rng = random.Random(0)
    for _ in range(2000):
        torn = bytearray(payload)
        torn[rng.randrange(len(torn))] = rng.randrange(256)
        with contextlib.suppress(msgspec.DecodeError):
            event_wire.decode(bytes(torn))
    assert event_wire.sequence_number([b"", b"1234567", b""], 3) is None
    assert event_wire.sequence_number([b"", b"12345678"], 3) is None


class Reader:
    """What somebody knows who reads vLLM's structs alone: a set of numbers for each medium."""

    def __init__(self) -> None:
        self.media: dict[str | None, set[bytes | int]] = {}

    def read(self, payload: bytes) -> None:
        for event in vllm.DECODER.decode(payload).events:
            if isinstance(event, vllm.AllBlocksCleared):
                self.media.clear()
            elif isinstance(event, vllm.BlockRemoved):
                self.media.setdefault(event.medium, set()).difference_update(event.block_hashes)
            else:
                self.media.setdefault(event.medium, set()).update(event.block_hashes)


@pytest.mark.parametrize("seed", range(4))
def test_a_reader_that_asks_from_anywhere_knows_what_the_cache_has(seed: int) -> None:
    rng = random.Random(seed)
    driver = Driver(num_blocks=30, block_size=2, num_rows=4)
    for _ in range(30):
        operate(driver, rng)
    log, stream = KVEventLog(driver.kv, with_tokens=True), KVEventStream(2, 50.0, buffer_steps=8)
    readers: list[tuple[int, Reader]] = []
    numbers: list[int] = []
    for _ in range(500):
        for _ in range(rng.randrange(6)):
            operate(driver, rng)
        if changes := log.take():
            number, payload = stream.publish(changes, 51.0)
            assert not numbers or number == numbers[-1] + 1
            numbers.append(number)
            readers = [(number, reader) for _, reader in readers]
            for _, reader in readers:
                reader.read(payload)
            readers.append((0, Reader()))
        for place, (last, reader) in enumerate(readers):
            if last == 0 or rng.random() < 0.05:  # it has lost some, and asks
                missing = rng.choice([0, last + 1, max(last - 3, 0), numbers[-1] - 20, numbers[-1] + 10**12])
                if last == 0:
                    missing = 0
                replay = stream.replay(missing)
                for _, payload in replay:
                    reader.read(payload)
                readers[place] = (numbers[-1], reader)
    index = driver.kv._index
    blocks = np.flatnonzero(index.contains(np.arange(len(index._parent_of)))).tolist()
    assert not log.take()
    truth = {int.from_bytes(index.digest_of(block)[-8:], "big") for block in blocks}
    assert len(readers) > 20 and all(reader.media.get("GPU", set()) == truth for _, reader in readers)


def test_a_replay_is_what_is_missing_or_all_there_is() -> None:
    stream = KVEventStream(4, 7.0, buffer_steps=3)
    assert stream.replay(0) == [], "nothing was ever published"
    sent = [stream.publish([CacheEvents(0, chain([bytes([i]) * 16]), ())], 8.0) for i in range(1, 6)]
    assert stream.replay(sent[-1][0] + 1) == []
    assert stream.replay(sent[2][0]) == sent[2:]
    for start in (0, sent[1][0], sent[-1][0] + 2, (6 << 32) + 3, (9 << 32)):
        ((number, payload),) = stream.replay(start)
        cleared, *stored = vllm.DECODER.decode(payload).events
        assert number == sent[-1][0] and isinstance(cleared, vllm.AllBlocksCleared)
        assert sorted(event.block_hashes[0] for event in stored) == sorted(int.from_bytes(bytes([i]) * 8, "big")
                                                                           for i in range(1, 6))
