"""`python -m tests.real.kv_events`: our KV events read by vLLM's structs and by Dynamo's indexer, and vLLM's publisher
read by us."""

from __future__ import annotations

import asyncio
import json
import random
import tempfile
import time
import types
from pathlib import Path

import httpx
import numpy as np
import zmq

from tests.kv.lossy_network import Cache
from tests.parallel.test_meeting import free_port
from tests.real.foreign import DYNAMO, VLLM, DynamoIndexer, Foreign
from tests.serving.server_process import ServerProcess, wait_for
from xllm.client.kv_subscriber import KVSubscriber
from xllm.engine.kv_publisher import KVPublisher
from xllm.kv.block import block_digests
from xllm.kv_events_settings import KVEvents
from xllm.routing.global_index import GlobalIndex, digest_keys
from xllm.routing.vllm_reader import VllmReader

BLOCK_SIZE, NUM_PROMPTS = 16, 40
KEY = "a-key-of-these-tests"
MEDIA = ("GPU", "CPU", "DISK")


def prompts(rng: random.Random) -> list[list[int]]:
    """Some of which share a beginning."""
    found: list[list[int]] = []
    for _ in range(NUM_PROMPTS):
        shared = rng.choice(found)[: rng.randrange(32, 200)] if found and rng.random() < 0.5 else []
        found.append([*shared, *(rng.randrange(10, 4000) for _ in range(rng.randrange(40, 200)))])
    return found


def keys_of(tokens: list[int]) -> np.ndarray:
    return digest_keys(b"".join(block_digests(np.array(tokens, dtype=np.int32), BLOCK_SIZE)))


def vllm_reads_ours(events: types.ModuleType, msgspec_decoder: object, folder: Path) -> str:
    """vLLM's `KVEventBatch` decodes every batch; what its events leave is what the cache has."""
    endpoint, replay = f"ipc://{folder}/pub", f"ipc://{folder}/replay"
    cache, media = Cache(0), {medium: set[int]() for medium in MEDIA}
    publisher = KVPublisher(KVEvents(enable_kv_cache_events=True, endpoint=endpoint, replay_endpoint=replay,
                                     event_encoding="map"), None, BLOCK_SIZE)
    context = zmq.Context()
    reader = context.socket(zmq.SUB)
    reader.subscribe("")
    reader.connect(endpoint)
    time.sleep(0.5)  # the subscription is on its way
    num_batches = num_events = 0
    try:
        for _ in range(300):
            publisher.put(cache.change())
        while num_batches < 300:
            assert reader.poll(5000), f"{num_batches} batches came"
            _, _, payload = reader.recv_multipart()
            for event in msgspec_decoder.decode(payload).events:  # type: ignore[attr-defined]
                num_events += 1
                if isinstance(event, events.AllBlocksCleared):
                    media = {medium: set() for medium in MEDIA}
                elif isinstance(event, events.BlockRemoved):
                    media[event.medium].difference_update(event.block_hashes)
                else:
                    assert isinstance(event, events.BlockStored) and event.block_size == BLOCK_SIZE
                    media[event.medium].update(event.block_hashes)
            num_batches += 1
    finally:
        publisher.close()
        context.destroy(linger=0)
    for medium, blocks in zip(MEDIA, cache.tiers):
        assert media[medium] == {int.from_bytes(digest[-8:], "big") for digest in blocks}, medium
    return f"{num_events} events of {num_batches} batches, {sum(map(len, cache.tiers))} blocks at the end"


async def we_read_vllm(events: types.ModuleType, folder: Path) -> str:
    """Its publisher sends, also what was sent before we came; prompts are found by our digests."""
    endpoint, replay = f"ipc://{folder}/vllm", f"ipc://{folder}/vllm-replay"
    publisher = events.ZmqEventPublisher(0, endpoint, replay)
    index, reader, rng = GlobalIndex(10_000), VllmReader(max_blocks=10_000), random.Random(0)
    subscriber = KVSubscriber(index)
    texts = prompts(rng)
    try:
        names: dict[bytes, bytes] = {}  # a block of one prefix has one hash
        for place, text in enumerate(texts):
            if place == NUM_PROMPTS // 2:
                subscriber.follow("vllm", endpoint, replay, reader=reader)
                await asyncio.sleep(0.3)
            num_blocks = len(text) // BLOCK_SIZE
            hashes = [names.setdefault(digest, len(names).to_bytes(32, "big"))
                      for digest in block_digests(np.array(text, dtype=np.int32), BLOCK_SIZE)]
            publisher.publish(events.KVEventBatch(ts=time.time(), events=[events.BlockStored(
                block_hashes=hashes, parent_block_hash=None, token_ids=text[: num_blocks * BLOCK_SIZE],
                block_size=BLOCK_SIZE, lora_id=None, medium="GPU", lora_name=None)]))
            if place == NUM_PROMPTS - 1:
                publisher.publish(events.KVEventBatch(ts=time.time(), events=[
                    events.BlockRemoved(block_hashes=hashes[-1:], medium="GPU")]))
        gone = texts.pop()

        def missing() -> list[int]:
            return [place for place, text in enumerate(texts)
                    if index.match(keys_of(text)).blocks_TI[0, 0] < len(text) // BLOCK_SIZE]

        until_s = time.monotonic() + 5
        while "vllm" not in index.names or missing():
            assert time.monotonic() < until_s, missing()
            await asyncio.sleep(0.05)
        until_s = time.monotonic() + 5
        while index.match(keys_of(gone)).blocks_TI[0, 0] != len(gone) // BLOCK_SIZE - 1:  # its last block was removed
            assert time.monotonic() < until_s
            await asyncio.sleep(0.05)
        assert reader.num_unread == 0 and subscriber.instances["vllm"].feed.num_broken == 0
        return f"{len(texts)} prompts are found whole, half of them told before we came"
    finally:
        await subscriber.close()
        publisher.shutdown()


def dynamo_reads_ours(dynamo: DynamoIndexer, number: int, encoding: str, folder: Path) -> str:
    """A real server whose cache is too small for its prompts: after each of them Dynamo's indexer finds what ours does,
    of every prompt so far."""
    pub, replay = (f"tcp://127.0.0.1:{free_port()}" for _ in range(2))
    config = json.dumps({"enable_kv_cache_events": True, "endpoint": pub, "replay_endpoint": replay,
                         "event_encoding": encoding})
    with ServerProcess(folder / f"{encoding}.log", "--dtype", "float32", "--num-kv-blocks", "64",
                       "--kv-events-config", config, "--kv-events-token-ids", "--admin-api-key", KEY,
                       key=KEY) as server:
        return asyncio.run(_compare(dynamo, number, server, pub, replay))


async def _compare(dynamo: DynamoIndexer, number: int, server: ServerProcess, pub: str, replay: str) -> str:
    index, sent, most, num_lost = GlobalIndex(10_000), list[list[int]](), 0, 0
    subscriber, worst_s = KVSubscriber(index), 0.0
    subscriber.follow("xllm", pub, replay)

    def ours() -> list[int]:
        return [int(index.match(keys_of(text)).blocks_TI[0, 0]) * BLOCK_SIZE for text in sent]

    def theirs() -> list[int]:
        return [dynamo.matched(number, text) for text in sent]

    def ask(text: list[int]) -> None:
        answer = httpx.post(f"{server.url}/v1/completions", timeout=60,  # without a key, which would salt the hashes
                            json={"model": "demo", "prompt": text, "max_tokens": 4})
        assert answer.status_code == 200, answer.text

    try:
        for place, text in enumerate(prompts(random.Random(1))):
            if place == 5:  # it comes late: what was told before it gets by a replay
                dynamo.follow(number, pub, replay)
            await asyncio.to_thread(ask, text)
            sent.append(text)
            if place < 5:
                continue
            began_s = time.monotonic()
            while True:
                await asyncio.sleep(0.02)
                found, other = ours(), await asyncio.to_thread(theirs)
                if found == other and found[-1] == len(text) // BLOCK_SIZE * BLOCK_SIZE:
                    break
                assert time.monotonic() - began_s < 5, (list(zip(found, other)), dynamo.log[-2000:])
            worst_s = max(worst_s, time.monotonic() - began_s)
            most, num_lost = max(most, sum(found)), sum(map(len, sent)) - sum(found)
        assert num_lost > 1000, "the cache was to be too small"
        assert server.http.post("/reset_prefix_cache").status_code == 200
        wait_for(lambda: not any(theirs()), 5, "Dynamo's index is empty")
    finally:
        await subscriber.close()
    return (f"the same {most} tokens at most of {NUM_PROMPTS} prompts as our index, after every one of them (within "
            f"{worst_s:.2f} s); {num_lost} evicted tokens are in neither; none after a reset")


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="real-") as name:
        folder = Path(name)
        foreign = Foreign(folder)
        events = foreign.vllm_events()
        decoder = events.msgspec.msgpack.Decoder(events.KVEventBatch)
        print(f"{VLLM}, its structs read ours:", vllm_reads_ours(events, decoder, folder), flush=True)
        print(f"{VLLM}, its publisher is read:", asyncio.run(we_read_vllm(events, folder)), flush=True)
        with foreign.dynamo_indexer(BLOCK_SIZE) as dynamo:
            for number, encoding in enumerate(("array", "map")):
                print(f"{DYNAMO}, its indexer reads {encoding}s:", dynamo_reads_ours(dynamo, number, encoding, folder),
                      flush=True)


if __name__ == "__main__":
    main()
