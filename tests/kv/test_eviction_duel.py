"""The duel of LRU and LRU-2: its shadows count what caches would have hit, and the better one leads."""

from __future__ import annotations

import random

import numpy as np
import pytest

from tests.kv.eviction_owner import Content, LRUKModel, LRUModel, Model, Owner, digest_of
from xllm.kv.eviction import LRU, LRUK, Duel
from xllm.kv.eviction.duel import RecencyOrder
from xllm.kv.eviction.lru_k import KOrder
from xllm.kv.eviction.ring import Stamps
from xllm.kv.eviction.shadow import Shadow


class SlowCache:
    """What a shadow stands for: the whole path enters, then victims go until it fits."""

    def __init__(self, size: int, model: Model):
        self.size, self.model, self.resident = size, model, []

    def use(self, path: list[Content]) -> int:
        path = path[: self.size]
        hits = next((i for i, c in enumerate(path) if c not in self.resident), len(path))
        self.model.used(path)
        self.resident = [c for c in self.resident if c not in path]
        while len(self.resident) + len(path) > self.size:
            self.resident.remove(self.model.choose(self.resident))
        self.resident += path[::-1]
        return hits


@pytest.mark.parametrize("kind", ["lru", "lru-k"])
def test_a_shadow_hits_what_a_real_cache_would(kind):
    for seed in range(20):
        rng, stamps = random.Random(seed), Stamps(5000)
        size = rng.choice([1, 4, 15])
        model = LRUKModel(2) if kind == "lru-k" else LRUModel()
        order = KOrder(size, stamps) if kind == "lru-k" else RecencyOrder(size, stamps)
        shadow, slow = Shadow(size, stamps, order), SlowCache(size, model)
        ids: dict[Content, int] = {}
        uses: dict[Content, list[int]] = {}
        for now in range(1, 150):
            tokens = (rng.randrange(4), *(rng.choice((0, 0, 1)) for _ in range(rng.randrange(6))))
            path = [tokens[: i + 1] for i in range(len(tokens))]
            for content in path:
                ids.setdefault(content, len(ids))
                uses.setdefault(content, [0, 0]).append(now)
            kth = np.array([uses[c][-2] for c in path])
            assert shadow.use(np.array([ids[c] for c in path], dtype=np.int32), kth) == slow.use(path), seed
        assert stamps.count <= size


def test_a_recycled_id_is_no_hit():
    stamps = Stamps(10)
    shadow = Shadow(5, stamps, RecencyOrder(5, stamps))
    path, kth = np.array([0, 1, 2], dtype=np.int32), np.zeros(3, dtype=np.int64)
    shadow.use(path, kth)
    shadow.forget(path[1:2])
    assert shadow.use(path, kth) == 1
    assert shadow.use(path, kth) == 3


def scan(rng: random.Random, first: int, num: int) -> list[Content]:
    """Few contents that come back, among many that come once: LRU-2 keeps the few."""
    return [(rng.randrange(30),) if i % 4 == 0 else (first + i,) for i in range(num)]


def drift(rng: random.Random, first: int, num: int) -> list[Content]:
    """What is used comes back soon, twice or more, then never: LRU-2 sticks to what is over."""
    return [(first + i // 4 * 4 + rng.randrange(-60, 4),) for i in range(num)]


def replay(policy, size: int, requests: list[Content]) -> int:
    """Returns the hits."""
    held: dict[Content, int] = {}
    content_at: dict[int, Content] = {}
    free, hits = list(range(size)), 0
    for content in requests:
        if content in held:
            hits += 1
            place = held[content]
            policy.revive(np.array([place], dtype=np.int32))
        else:
            if not free:
                free = policy.victims(1).tolist()
                del held[content_at.pop(free[0])]
            place = held[content] = free.pop()
            content_at[place] = content
            policy.admit([place], [digest_of(content)], [-1])
        ids = np.array([place], dtype=np.int32)
        policy.use(ids)
        policy.retire(ids)
    return hits


def test_it_follows_a_change_of_the_traffic():
    size, rng = 40, random.Random(0)
    scans, drifts = scan(rng, 10_000, 2500), drift(rng, 50_000, 2500)
    duel = Duel(size)
    hits = replay(duel, size, scans)
    assert duel.leader == "lru-k"
    assert hits > 1.2 * replay(LRU(size), size, scans)
    duel = Duel(size)
    replay(duel, size, drifts)
    assert duel.leader == "lru"
    both, mixed = Duel(size), [*scans, *drifts, *scan(rng, 100_000, 2500)]
    total = replay(both, size, mixed)
    assert both.num_switches >= 2
    assert both.leader == "lru-k"
    assert total > max(replay(LRU(size), size, mixed), replay(LRUK(size), size, mixed))


def test_it_is_close_to_the_better_of_the_two():
    size, rng = 40, random.Random(1)
    for requests in (scan(rng, 10_000, 4000), drift(rng, 50_000, 4000)):
        lru, lru_k = (replay(policy, size, requests) for policy in (LRU(size), LRUK(size)))
        assert abs(lru - lru_k) > 0.01 * len(requests), "the two must differ for this to say anything"
        assert replay(Duel(size), size, requests) >= max(lru, lru_k) - 0.01 * len(requests)


@pytest.mark.parametrize(("leader", "model"), [(0, LRUModel), (1, lambda: LRUKModel(2))], ids=["lru", "lru-k"])
def test_victims_come_in_the_leaders_order(leader, model):
    for seed in range(10):
        rng = random.Random(seed)
        duel = Duel(20, 2, 1000.0)
        owner = Owner(duel, 20, model())
        for _ in range(200):
            duel._lead = leader - 0.5  # whatever the hits say
            duel._leader = leader
            if rng.random() < 0.5 and len(owner.rows) < 3:
                owner.enter((rng.randrange(4), *(rng.choice((0, 0, 1, 2)) for _ in range(rng.randrange(5)))))
            elif owner.rows:
                owner.leave(rng.randrange(len(owner.rows)))
        assert owner.num_evicted > 50


def test_contents_that_never_come_back_hit_nothing(monkeypatch):
    """Though the table of uses is small, and every id is soon another content's."""
    duel, hits = Duel(100, 2, 0.0), []
    for shadow in duel._shadows:
        monkeypatch.setattr(shadow, "use", lambda *args, use=shadow.use: hits.append(use(*args)) or hits[-1])
    replay(duel, 100, [(i,) for i in range(1000)])
    assert len(hits) == 2000
    assert not any(hits)
