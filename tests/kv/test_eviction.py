"""Every eviction policy under a tier's owner: what it promises, and who goes first."""

from __future__ import annotations

import random

import numpy as np
import pytest

from tests.kv.eviction_owner import FIFOModel, LFUModel, LRUKModel, LRUModel, Owner, digest_of, drive
from xllm.config import EVICTION_POLICIES, EngineConfig
from xllm.errors import ConfigError
from xllm.kv.eviction import FIFO, LFU, LRU, LRUK, Protected, make_policy
from xllm.kv.manager import KVManager


@pytest.mark.parametrize("l1_share", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("name", EVICTION_POLICIES)
def test_victims_are_evictable_leaves(name, l1_share):
    """`Owner` checks it at every step: forests, several holders at once, places forgotten."""
    evicted = hits = 0
    for seed in range(12):
        rng = random.Random(seed)
        num_places = rng.choice([1, 3, 8, 20])
        policy = make_policy(name, num_places, lru_k=rng.choice([1, 2, 3]), history=rng.choice([0.0, 1.0, 10.0]),
                             l1_share=l1_share)
        owner = Owner(policy, num_places)
        drive(owner, rng, 120)
        evicted, hits = evicted + owner.num_evicted, hits + owner.num_hits
    assert evicted > 100
    assert hits > 100


@pytest.mark.parametrize(("make", "model"), [
    (LRU, LRUModel),
    (FIFO, FIFOModel),
    (LFU, LFUModel),
    (lambda n: LRUK(n, 1, 1000.0), lambda: LRUKModel(1)),
    (lambda n: LRUK(n, 2, 1000.0), lambda: LRUKModel(2)),
    (lambda n: LRUK(n, 3, 1000.0), lambda: LRUKModel(3)),
], ids=["lru", "fifo", "lfu", "lru-1", "lru-2", "lru-3"])
def test_the_order_is_that_of_a_slow_model(make, model):
    for seed in range(40):
        rng = random.Random(seed)
        num_places = rng.choice([1, 3, 8, 20])
        try:
            drive(Owner(make(num_places), num_places, model()), rng, 120)
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error


def test_lru_k_prefers_what_came_back_over_what_came_once():
    """The history of evicted contents: without it a scan would push out what is used now and then."""
    policy = LRUK(2, 2, 10.0)
    owner = Owner(policy, 2)
    for tokens in [(1,), (2,), (3,), (1,), (4,), (5,), (1,)]:
        owner.enter(tokens)
        owner.leave(0)
    assert owner.num_hits == 1  # (1,) was evicted once, and not again
    assert (1,) in owner.place_of


def test_lru_k_compacts_in_order():
    """Far more retirements than the buffers hold, with runs of one and of many."""
    rng = random.Random(0)
    owner = Owner(LRUK(40, 2, 1000.0), 40, LRUKModel(2))
    for _ in range(3):
        drive(owner, rng, 300, forgets=False)


def protected_and_not(policy: Protected) -> tuple[int, int]:
    """How many of the evictable places are in L1 and in L2."""
    hot = policy.num_hot(np.arange(10))
    return hot, len(policy) - hot


def test_protected_keeps_what_was_used_twice():
    policy = Protected(10, LRU(10), 0.4)
    owner = Owner(policy, 10)
    for _ in range(2):
        owner.enter((1, 2, 3))
        owner.leave(0)
    assert protected_and_not(policy) == (3, 0)
    for i in range(20):
        owner.enter((100 + i,))
        owner.leave(0)
    assert protected_and_not(policy) == (3, 7)
    assert (1, 2, 3) in owner.place_of
    path = owner.places([(1,), (1, 2), (100 + 19,)])
    assert policy.num_hot(path) == 2


def test_what_overflows_the_protected_tier_can_be_evicted():
    policy = Protected(10, LRU(10), 0.4)
    owner = Owner(policy, 10)
    for i in range(3):
        for _ in range(2):
            owner.enter((i, 0, 0))
            owner.leave(0)
    assert protected_and_not(policy) == (4, 5)
    assert {c[0] for c in owner.idle[-4:]} == {1, 2}  # the least recent of the hot ones fell
    owner.evict(9)
    assert protected_and_not(policy) == (0, 0)


def test_a_preempted_row_does_not_count_as_a_use():
    def evicted_first(used: bool) -> int:
        kv = KVManager(num_blocks=4, block_size=1, num_rows=1, max_tokens_per_row=4, policy=LFU(4))
        for tokens, counts in (([1], True), ([1], used), ([2], True), ([2], True), ([1], used)):
            array = np.array(tokens, dtype=np.int32)
            kv.enter(0, kv.lookup(np.append(array, np.int32(-1)), ""), 0)
            kv.grow(np.array([0]), kv.blocks_needed(np.array([0]), np.array([1])))
            kv.commit(0, array, 1, -1)
            kv.leave(0, -1, used=counts)
        kv.pool.release(kv.pool.allocate(3), -1)  # two were free: one of the two cached ones had to go
        found = [t for t in (1, 2) if len(kv.lookup(np.array([t, -1], dtype=np.int32), "").block_ids)]
        assert len(found) == 1
        return 3 - found[0]

    assert evicted_first(used=True) == 2
    assert evicted_first(used=False) == 1


def test_every_name_of_the_settings_makes_a_policy():
    for name in EVICTION_POLICIES:
        assert len(make_policy(name, 5)) == 0
    with pytest.raises(ConfigError, match="clock"):
        make_policy("clock", 5)


@pytest.mark.parametrize(("name", "value"), [("eviction_policy", "clock"), ("lru_k", 0), ("eviction_history", -1.0),
                                             ("eviction_history", 1e9), ("l1_share", 1.0), ("l1_share", -0.1)])
def test_settings_that_cannot_work_are_refused(name, value):
    with pytest.raises(ConfigError, match=name):
        EngineConfig.from_flat(**{name: value}).resolve(model_max_len=64, default_block_size=16)


class _Counted:
    """Contents one by one, each retired at once, the pool always full."""

    def __init__(self, name: str, num_places: int):
        self.policy, self.num_places, self.num_admitted = make_policy(name, num_places), num_places, 0

    def run(self, num_contents: int, rng: random.Random) -> None:
        free = list(range(self.num_places))
        for _ in range(num_contents):
            if not free:
                free = self.policy.victims(8).tolist()
            ids = np.array([free.pop()], dtype=np.int32)
            self.policy.admit(ids, [digest_of((self.num_admitted,))], np.array([-1], dtype=np.int32))
            self.num_admitted += 1
            for _ in range(rng.choice([1, 1, 2, 3])):
                self.policy.use(ids)
                self.policy.retire(ids)
                self.policy.revive(ids)
            self.policy.retire(ids)


@pytest.mark.parametrize("name", ["lru", "lru-k", "duel", "fifo", "arc", "s3-fifo"])
def test_the_work_per_content_does_not_grow_with_the_tier(name):
    def work(num_places: int) -> float:
        counted = _Counted(name, num_places)
        counted.run(8 * num_places, random.Random(1))
        p = counted.policy
        if name in ("fifo", "arc", "s3-fifo"):
            return p.num_looked_at / counted.num_admitted
        orders = [p._ring] if name == "lru" else [p._order] if name == "lru-k" else p._orders
        return sum(order.num_moved for order in orders) / counted.num_admitted

    small, large = work(100), work(800)
    assert large < 1.3 * small
    assert large < 25
