"""Feeds: whatever is lost, repeated, late or torn, the index says in the end what the instance has; and vLLM's events
in our digests."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest

from tests.kv import vllm_structs as vllm
from xllm.kv.block import ROOT, TIERS, block_digests
from xllm.kv.event_log import CacheEvents
from xllm.kv.event_stream import KVEventStream
from xllm.routing.event_feed import EventFeed, OwnReader
from xllm.routing.global_index import GlobalIndex, digest_keys
from xllm.routing.vllm_reader import VllmReader


class Instance:
    """An instance with random blocks in its tiers, and its stream."""

    def __init__(self, rng: random.Random, started_s: float):
        self.rng, self.now_s = rng, started_s
        self.stream = KVEventStream(1, started_s, buffer_steps=20)
        self.tiers: list[dict[bytes, None]] = [{} for _ in TIERS]

    def step(self) -> tuple[int, bytes]:
        changes = []
        for tier, blocks in enumerate(self.tiers):
            removed = [digest for digest in blocks if self.rng.random() < 0.1]
            for digest in removed:
                del blocks[digest]
            stored = {self.rng.randbytes(16): ROOT for _ in range(self.rng.randrange(4))}
            blocks.update(dict.fromkeys(stored))
            changes.append(CacheEvents(tier, stored, removed))
        self.now_s += 0.01
        return self.stream.publish(changes, self.now_s)

    def check(self, index: GlobalIndex, name: str) -> None:
        for tier, blocks in enumerate(self.tiers):
            assert set(index.keys_of(name, tier).tolist()) == set(digest_keys(b"".join(blocks)).tolist())


def replay(feed: EventFeed, instance: Instance) -> None:
    for batch in instance.stream.replay(feed.start):
        feed.take_replayed(*batch)
    feed.end_replay()


@pytest.mark.parametrize("seed", range(3))
def test_what_is_lost_repeated_and_late_is_made_good(seed: int) -> None:
    rng = random.Random(seed)
    index = GlobalIndex(20_000)
    instance, feed = Instance(rng, 100.0), EventFeed(index, "a", OwnReader())
    late: list[tuple[int, bytes]] = []
    for number in range(600):
        if number in (200, 400):  # started anew, the second time with a clock that has been put back
            instance = Instance(rng, instance.now_s + 2.0 if number == 200 else 50.0)
        batch = instance.step()
        chance = rng.random()
        if chance < 0.05:
            late.append(batch)
        elif chance < 0.1:
            feed.take(batch[0], batch[1][: rng.randrange(len(batch[1]))])
        elif chance > 0.05:
            feed.take(*batch)
        if chance > 0.95:
            feed.take(*batch)
        if late and rng.random() < 0.1:
            feed.take(*late.pop(rng.randrange(len(late))))
        if feed.is_behind and rng.random() < 0.5:
            replay(feed, instance)
        elif not feed.is_behind and feed.start == instance.stream._next:
            instance.check(index, "a")
    feed.ask_again()
    replay(feed, instance)
    instance.check(index, "a")
    assert feed.num_gaps > 20 and feed.num_repeated > 20 and feed.num_broken > 10 and not feed.is_behind


def test_a_replay_that_has_lost_a_batch_itself_is_asked_for_as_a_whole() -> None:
    rng, index = random.Random(0), GlobalIndex(1000)
    instance, feed = Instance(rng, 1.0), EventFeed(index, "a", OwnReader())
    feed.take(*instance.step())
    replay(feed, instance)
    for torn in (lambda batches: batches[1:], lambda batches: [batches[0], *batches[2:]],
                 lambda batches: [(batches[0][0], batches[0][1][:5]), *batches[1:]]):
        for batch in [instance.step() for _ in range(6)][-1:]:
            feed.take(*batch)
        assert feed.is_behind
        for batch in torn(instance.stream.replay(feed.start)):
            feed.take_replayed(*batch)
        feed.end_replay()
        assert feed.is_behind and feed.start == 0, "what it knows is not taken for all that there is"
        replay(feed, instance)
        assert not feed.is_behind
        instance.check(index, "a")


def test_without_replays_a_gap_costs_all_that_is_known() -> None:
    rng, index = random.Random(0), GlobalIndex(1000)
    instance = Instance(rng, 1.0)
    feed = EventFeed(index, "a", OwnReader(), can_replay=False)
    batches = [instance.step() for _ in range(9)]
    for batch in batches[:5]:
        feed.take(*batch)
    assert len(index.keys_of("a", 0)) > 0
    feed.take(*batches[7])
    assert feed.num_gaps == 1 and not feed.is_behind
    truth = set(digest_keys(b"".join(instance.tiers[0])).tolist())
    feed.take(*batches[8])
    assert set(index.keys_of("a", 0).tolist()) <= truth, "it may know less, never more"


def test_a_medium_that_nobody_knows_is_counted() -> None:
    index, reader = GlobalIndex(100), OwnReader()
    feed = EventFeed(index, "a", reader, can_replay=False)
    feed.take(5, vllm.ENCODER.encode(vllm.KVEventBatch(1.0, [
        vllm.BlockStored([1, 2], None, [], 1, None, "TAPE", None), vllm.BlockStored([3], None, [], 1, None, None, None),
        vllm.BlockStored([4, 0], None, [], 1, None, "nvme", None)], 0)))
    assert reader.num_unread == 2
    assert [sorted(index.keys_of("a", tier).tolist()) for tier in range(3)] == [[3], [], [1, 4]]


# --- vLLM


class VllmServer:
    """Batches as a vLLM server numbers them: from 0 on, each time it is started."""

    def __init__(self, feed: EventFeed, start_s: float):
        self.feed, self.now_s, self.number = feed, start_s, 0

    def send(self, *events: vllm.KVCacheEvent) -> None:
        self.now_s += 1
        batch = vllm.KVEventBatch(self.now_s, list(events), 0)
        self.feed.take(self.number, vllm.ENCODER.encode(batch))
        self.number += 1


def stored(tokens: Sequence[int], first: int, last: int, name: int = 0, **more: object) -> vllm.BlockStored:
    """Blocks of 4 of a text whose hashes in vLLM are name + 1, name + 2, ..."""
    fields = {"lora_id": None, "medium": "GPU", "lora_name": None, **more}
    return vllm.BlockStored(list(range(name + first + 1, name + last + 1)), name + first if first else None,
                            list(tokens[4 * first : 4 * last]), 4, **fields)


def test_vllms_blocks_are_found_by_our_digests() -> None:
    index = GlobalIndex(1000)
    reader = VllmReader(max_blocks=100)
    server = VllmServer(EventFeed(index, "v", reader, can_replay=False), 10.0)
    text, fork = list(range(40)), [*range(20), *range(500, 520)]
    keys, fork_keys = (digest_keys(b"".join(block_digests(np.array(t, dtype=np.int32), 4))) for t in (text, fork))

    def found(of: np.ndarray) -> list[int]:
        return index.match(of).blocks_TI[:, 0].tolist()

    server.send(stored(text, 0, 3))
    server.send(stored(text, 3, 10))
    assert found(keys) == [10, 10, 10]
    fork_event = stored(fork, 5, 10, name=100)
    fork_event.parent_block_hash = 5  # its first five blocks are those of the other text
    server.send(fork_event)
    assert found(fork_keys) == [10, 10, 10]
    server.send(stored([], 0, 4, medium="CPU"), vllm.BlockRemoved([9, 10, 4], "GPU"))
    assert found(keys) == [3, 8, 8], "the other tier needs no tokens for what is known"
    assert reader.num_unread == 0
    server.send(stored(text, 8, 9), stored(text, 0, 2, name=300, lora_name="x"), stored(text, 0, 1, name=400,
                extra_keys=[("salt",)]), stored(text, 0, 1, name=500, group_idx=1), stored([-1] * 4, 0, 1, name=600))
    assert reader.num_unread == 5, "what cannot be named in our digests"
    server.send(vllm.AllBlocksCleared())
    assert found(keys) == [0, 0, 0] and not reader._blocks
    server.send(stored(text, 0, 2))
    again = VllmServer(server.feed, 100.0)  # started anew
    again.send(stored(fork, 0, 5, name=900))
    assert found(fork_keys) == [5, 5, 5] and len(index.keys_of("v", 0)) == 5
    again.send(*(stored([i] * 4, 0, 1, name=1000 + i) for i in range(100)))
    assert len(reader._blocks) == 100 and reader.num_unread == 10, "its memory is bounded"
