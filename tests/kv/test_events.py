"""KV events: replayed, they say at every moment which blocks are findable. The store machine checks it as well, with
loads from host memory and evictions under them."""

import random

import numpy as np
import pytest

from tests.kv.desk import BLOCK, Desk, talk
from tests.kv.driver import Driver
from tests.kv.replay import Replay
from xllm.kv.block import ROOT, block_digests
from xllm.kv.event_log import KVEventLog

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


def test_a_block_that_any_tier_has_is_cached():
    desk, log, late = Desk(), KVEventLog(), KVEventLog()
    history = talk(1, 6 * BLOCK)
    digests = block_digests(history.array, BLOCK)
    desk.kv.listen(log, below=True)
    desk.turn(history)
    assert len(desk.tiers.host) == 6 and log.take() == (b"".join(digests), b"")
    desk.forget_device()
    assert log.take() is None, "host memory has them"
    desk.kv.listen(late, below=True)
    assert late.take() == (b"".join(digests), b"")
    desk.forget_host()
    stored, removed = late.take()
    assert stored == b"" and {removed[i : i + 16] for i in range(0, len(removed), 16)} == set(digests)
