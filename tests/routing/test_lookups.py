"""Look-ups while an instance's cache changes: over KV events through a network that loses some, and over the gate of a
real engine under load."""

from __future__ import annotations

import asyncio
import os
import random
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from tests.kv.lossy_network import Cache, LossyNetwork
from tests.llm.gated import WatchedLocal, gated_client
from tests.llm.test_clients import read
from tests.routing.lookup_history import Changed, LookUp, judge
from xllm.client.kv_subscriber import KVSubscriber
from xllm.config import EngineConfig
from xllm.engine.commands import CacheChanges
from xllm.engine.core import EngineCore
from xllm.engine.kv_publisher import KVPublisher
from xllm.kv.block import ROOT, block_digests
from xllm.kv.event_log import CacheEvents
from xllm.kv_events_settings import KVEvents
from xllm.request import Request, SamplingParams
from xllm.routing.global_index import GlobalIndex, TierChange, digest_keys

ALL = os.environ.get("INDEX_ALL") == "1"
NUM_STEPS, NUM_REQUESTS = (10_000, 100) if ALL else (250, 6)  # requests: of each of four callers


def asked(index: GlobalIndex, name: str, keys: np.ndarray) -> LookUp:
    begun_s = time.monotonic()
    found = index.match(keys)
    place = found.names.index(name)
    return LookUp(begun_s, time.monotonic(), tuple(keys.tolist()), tuple(found.blocks_TI[:, place].tolist()))


def keys_of(joined: bytes) -> frozenset[int]:
    return frozenset(digest_keys(joined).tolist())


async def test_behind_a_network_that_loses_some_every_answer_was_so() -> None:
    """In steps of which each changes several tiers: nobody may see half of one."""
    index, rng, changes, look_ups = GlobalIndex(100_000), random.Random(0), list[Changed](), list[LookUp]()
    cache = Cache(0)
    texts = [[rng.randbytes(16) for _ in range(12)] for _ in range(20)]
    with tempfile.TemporaryDirectory(prefix="kv-") as name:
        folder = Path(name)
        publisher = KVPublisher(KVEvents(enable_kv_cache_events=True, endpoint=f"ipc://{folder}/pub",
                                         replay_endpoint=f"ipc://{folder}/replay"), None, 16)
        network, subscriber = LossyNetwork(folder, 0), KVSubscriber(index)
        try:
            subscriber.follow("a", f"ipc://{folder}/lossy", f"ipc://{folder}/replay")
            await asyncio.sleep(0.2)
            for _ in range(NUM_STEPS):
                step = cache.change()
                for change in step:  # pieces of texts come and go besides
                    text = rng.choice(texts)
                    place = rng.randrange(len(text))
                    for digest in text[place:] if rng.random() < 0.5 else text[: place + 1]:
                        if rng.random() < 0.7 and digest not in change.removed:
                            change.stored[digest] = ROOT
                            cache.tiers[change.tier][digest] = None
                changes.append(Changed(
                    time.monotonic(),
                    tuple((change.tier, keys_of(b"".join(change.removed))) for change in step),
                    tuple((change.tier, keys_of(b"".join(change.stored))) for change in step)))
                publisher.put(step)
                for _ in range(3):
                    await asyncio.sleep(0.001)
                    look_ups.append(asked(index, "a", digest_keys(b"".join(rng.choice(texts)))))
            feed = subscriber.instances["a"].feed
            assert feed.num_gaps > 5 and network.num_harmed > 10
        finally:
            network.close()
            publisher.close()
            await subscriber.close()
    judgement = judge(changes, look_ups, stale_s=2.0)
    print(f"{len(look_ups)} look-ups during {len(changes)} steps, {feed.num_gaps} gaps; at most "
          f"{judgement.furthest_behind_s:.3f} s behind")
    assert not judgement.complaints, judgement.complaints[:5]
    assert len({look_up.answer for look_up in look_ups}) > 10


async def test_at_a_real_instance_under_load_every_answer_was_so() -> None:
    """What its gate tells, as its cache, which is too small, changes with each request."""
    changes, look_ups, rng, index = list[Changed](), list[LookUp](), random.Random(0), GlobalIndex(10_000)
    core = EngineCore(EngineConfig.from_flat(
        device="cpu", dtype="float32", num_kv_blocks=32, max_model_len=256, num_threads=1, max_num_seqs=4))
    loop = asyncio.get_running_loop()

    def hear(events: list[CacheEvents]) -> None:  # in the engine's thread
        for event in events:
            told = CacheChanges(event.tier, b"".join(event.stored), b"".join(event.removed))
            loop.call_soon_threadsafe(lambda told=told: engine.on_cache_changes(told))

    core.cache_watch.listen(hear)
    engine = WatchedLocal(core)

    def note(told: CacheChanges) -> None:
        changes.append(Changed(time.monotonic(), ((told.tier, keys_of(told.removed)),),
                               ((told.tier, keys_of(told.stored)),)))

    engine.on_cache_changes = note
    index.forget("a")
    prompts = [[rng.randrange(10, 4000) for _ in range(160)] for _ in range(8)]
    try:
        async with gated_client(engine) as client:
            client.on_cache_changes = lambda told: index.change("a", [
                TierChange(told.tier, digest_keys(told.stored), digest_keys(told.removed))])

            async def send(number: int) -> None:
                drawn = random.Random(number)
                for _ in range(NUM_REQUESTS):
                    tokens = drawn.choice(prompts)[: drawn.randrange(96, 160)]
                    await read(client.submit([Request(
                        request_id=f"{number}/{drawn.random()}", prompt_token_ids=tokens,
                        sampling=SamplingParams(max_tokens=1))]))

            senders = [asyncio.create_task(send(number)) for number in range(4)]
            while not all(sender.done() for sender in senders):
                await asyncio.sleep(0.001)
                keys = digest_keys(b"".join(block_digests(np.array(rng.choice(prompts), dtype=np.int32), 16)))
                look_ups.append(asked(index, "a", keys))
            await asyncio.gather(*senders)
    finally:
        engine.shutdown()
    judgement = judge(changes, look_ups, stale_s=1.0)
    print(f"{len(look_ups)} look-ups during {len(changes)} changes; at most {judgement.furthest_behind_s:.3f} s behind")
    assert not judgement.complaints, judgement.complaints[:5]
    assert len(changes) > 10 and sum(bool(keys) for change in changes for _, keys in change.removed) > 5


STEPS = [Changed(1.0, (), ((0, frozenset({1, 2})),)), Changed(2.0, ((0, frozenset({2})),), ((1, frozenset({2, 3})),)),
         Changed(3.0, ((0, frozenset({1})), (1, frozenset({2, 3}))))]


@pytest.mark.parametrize(("answers", "words"), [
    ([(0.5, (0, 0, 0)), (1.5, (2, 2, 2)), (2.5, (1, 3, 3)), (3.5, (0, 0, 0))], None),
    ([(1.5, (0, 0, 0)), (2.5, (0, 0, 0)), (2.6, (1, 3, 3))], None),  # late, but soon enough
    ([(0.5, (2, 2, 2))], "at 0.500 the answer was"),  # before it was so
    ([(2.5, (1, 1, 1))], "at 2.500 the answer was"),  # half of a step
    ([(2.5, (1, 3, 3)), (2.6, (2, 2, 2))], "at 2.600 the answer was"),  # back again
    ([(3.7, (2, 2, 2))], "at 3.700 the answer was"),  # too late
])
def test_a_wrong_answer_is_found_out(answers: list[tuple[float, tuple[int, ...]]], words: str | None) -> None:
    look_ups = [LookUp(at_s, at_s + 0.01, (1, 2, 3), answer) for at_s, answer in answers]
    complaints = judge(STEPS, look_ups, stale_s=1.6).complaints
    assert complaints == [] if words is None else complaints and words in complaints[0]
