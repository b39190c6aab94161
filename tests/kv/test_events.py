"""KV events: replayed, they say at every moment which blocks are findable. The store machine checks it as well, with
loads from host memory and evictions under them."""

import random

import numpy as np
import pytest

from tests.kv.desk import BLOCK, Desk, talk
from tests.kv.driver import Driver
from tests.kv.replay import Replay
from xllm.kv.block import ROOT, block_digests
from xllm.kv.event_log import CacheEvents, KVEventLog

DEVICE, HOST = 0, 1  # tiers
WEIGHTS = {"admit": 3, "run": 3, "extend": 1, "settle": 3, "finish": 3, "pin": 0.5, "unpin": 1, "lease": 0.5,
           "end_lease": 0.5, "pass_time": 1, "drop_cached": 0.3}  # fmt: skip


def random_history(seed: int, num_operations: int, *, listens_after: int = 0) -> tuple[Driver, Replay]:
    """A driver under random operations; the sink joins after so many."""
    rng = random.Random(seed)
    driver = Driver(num_blocks=rng.choice([4, 10, 30]), block_size=rng.choice([1, 2]), num_rows=4)
    replay = Replay(driver.kv._index)
    for number in range(num_operations):
        if number == listens_after:
            driver.kv.listen(replay)
        operate(driver, rng)
        if number >= listens_after:
            replay.check()
    return driver, replay


def operate(driver: Driver, rng: random.Random) -> None:
    rows = sorted(driver.tokens)
    (name,) = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))
    if name == "admit":
        driver.admit(tuple(rng.randrange(3) for _ in range(rng.randint(1, 8))))
    elif name in ("settle", "unpin", "end_lease", "pass_time", "drop_cached"):
        getattr(driver, name)()
    elif rows and name == "extend":
        driver.extend(rng.choice(rows), rng.randrange(2))
    elif rows:
        getattr(driver, name)(rng.choice(rows))


@pytest.mark.parametrize("start", range(0, 60, 20))
def test_a_replay_finds_what_the_index_finds_at_every_moment(start):
    num_removed = 0
    for seed in range(start, start + 20):
        _, replay = random_history(seed, 300)
        num_removed += replay.num_removed
    assert num_removed > 100, "little was ever evicted"


def test_who_comes_late_is_told_what_is_there():
    told_at_once = 0
    for seed in range(30):
        driver, replay = random_history(seed, 120, listens_after=60)
        told_at_once += replay.num_stored > 0
        driver.finish_all()
        driver.drop_cached()
        assert not replay.parent_of
    assert told_at_once > 15


def test_what_is_loaded_evicted_and_reset_is_told():
    desk = Desk()
    replay = Replay(desk.kv._index)
    history = talk(1, 6 * BLOCK)
    digests = block_digests(history.array, BLOCK)
    desk.turn(history)
    desk.kv.listen(replay)
    assert list(replay.parent_of.items()) == list(zip(digests, [ROOT, *digests]))
    desk.forget_device()
    assert not replay.parent_of
    array = np.append(history.array, 0).astype(np.int32)
    match = desk.kv.lookup(array, "")
    desk.kv.load(1, match, desk.kv.extend(match, array), 0)
    assert set(replay.parent_of) == set(digests), "findable before its bytes have come"
    desk.settle()
    desk.kv.let_go(1)
    assert desk.kv.reset_prefix_cache() == 6 and not replay.parent_of
    assert (replay.num_stored, replay.num_removed) == (12, 12)


def test_each_tier_tells_what_it_has():
    desk = Desk()
    history = talk(1, 6 * BLOCK)
    digests = block_digests(history.array, BLOCK)
    log = KVEventLog(desk.kv)
    desk.turn(history)
    parents = dict(zip(digests, [ROOT, *digests]))
    assert len(desk.tiers.host) == 6
    assert log.take() == [CacheEvents(DEVICE, parents, ()), CacheEvents(HOST, parents, ())]
    desk.forget_device()
    (gone,) = log.take()
    assert (gone.tier, gone.stored, set(gone.removed)) == (DEVICE, {}, set(digests))
    late = KVEventLog(desk.kv)
    assert late.take() == [CacheEvents(HOST, parents, ())], "who comes late is told what is there"
    desk.forget_host()
    (gone,) = late.take()
    assert (gone.tier, gone.stored, set(gone.removed)) == (HOST, {}, set(digests)) and late.take() == []


def test_tokens_are_told_of_blocks_without_a_salt() -> None:
    told: dict[str, dict[bytes, bytes]] = {}
    for salt in ("", "alice"):
        driver = Driver(num_blocks=10, block_size=2, num_rows=2)
        log = KVEventLog(driver.kv, with_tokens=True)
        tokens = np.array([1, 2, 3, 4, 5], dtype=np.int32)
        driver.kv.enter(0, driver.kv.lookup(tokens, salt), 0)
        driver.kv.grow(np.array([0]), np.array([3]))
        driver.kv.commit(0, tokens, 5, 0)
        (events,) = log.take()
        assert list(events.stored) == block_digests(tokens, 2, salt)
        told[salt] = events.tokens
    assert told["alice"] == {}
    assert [np.frombuffer(data, "<i4").tolist() for data in told[""].values()] == [[1, 2], [3, 4]]
