"""ARC and S3-FIFO against their published algorithms, on contents without parents used one at a time."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from tests.kv.eviction_owner import digest_of
from xllm.kv.eviction import ARC, S3FIFO, EvictionPolicy


class SlowARC:
    """ARC(c) of the FAST 2003 paper, but that room is made before it is known which list the content is in."""

    def __init__(self, size: int):
        self.size, self.p = size, 0.0
        self.t1: list[int] = []
        self.t2: list[int] = []
        self.b1: list[int] = []
        self.b2: list[int] = []

    def request(self, x: int) -> bool:
        if x in self.t1 or x in self.t2:
            (self.t1 if x in self.t1 else self.t2).remove(x)
            self.t2.append(x)
            return True
        if len(self.t1) + len(self.t2) == self.size:
            self.replace()
        came_back = x in self.b1 or x in self.b2
        if x in self.b1:
            self.p = min(self.size, self.p + max(1.0, len(self.b2) / len(self.b1)))
            self.b1.remove(x)
        elif x in self.b2:
            self.p = max(0.0, self.p - max(1.0, len(self.b1) / len(self.b2)))
            self.b2.remove(x)
        (self.t2 if came_back else self.t1).append(x)
        self.trim()
        return False

    def replace(self) -> None:
        if self.t1 and (len(self.t1) > self.p or not self.t2):
            self.b1.append(self.t1.pop(0))
        else:
            self.b2.append(self.t2.pop(0))
        self.trim()

    def trim(self) -> None:
        while self.b1 and len(self.t1) + len(self.b1) > self.size:
            self.b1.pop(0)
        while self.b2 and sum(map(len, (self.t1, self.t2, self.b1, self.b2))) > 2 * self.size:
            self.b2.pop(0)


class SlowS3FIFO:
    """Algorithm 1 of the SOSP 2023 paper."""

    def __init__(self, size: int):
        self.size, self.small_size = size, max(1, size // 10)
        self.small: list[int] = []
        self.main: list[int] = []
        self.ghosts: list[int] = []
        self.frequency: Counter[int] = Counter()

    def request(self, x: int) -> bool:
        if x in self.small or x in self.main:
            self.frequency[x] = min(3, self.frequency[x] + 1)
            return True
        while len(self.small) + len(self.main) == self.size:
            self.evict()
        self.frequency[x] = 0
        if x in self.ghosts:
            self.ghosts.remove(x)
            self.main.append(x)
        else:
            self.small.append(x)
        return False

    def evict(self) -> None:
        if self.small and (len(self.small) >= self.small_size or not self.main):
            x = self.small.pop(0)
            if self.frequency[x] > 1:
                self.main.append(x)
            else:
                self.ghosts.append(x)
                self.ghosts = self.ghosts[-max(1, self.size - self.small_size) :]
            return
        x = self.main.pop(0)
        if self.frequency[x]:
            self.frequency[x] -= 1
            self.main.append(x)


def hits(policy: EvictionPolicy, size: int, requests: list[int]) -> list[bool]:
    place_of: dict[int, int] = {}
    free = list(range(size))
    found = []
    for x in requests:
        found.append(x in place_of)
        if x in place_of:
            policy.revive(np.array([place_of[x]], dtype=np.int32))
        else:
            if not free:
                free = policy.victims(1).tolist()
                del place_of[next(c for c, place in place_of.items() if place == free[0])]
            place_of[x] = free.pop()
            policy.admit([place_of[x]], [digest_of((x,))], [-1])
        ids = np.array([place_of[x]], dtype=np.int32)
        policy.use(ids)
        policy.retire(ids)
    return found


def traffic(rng: random.Random, num: int) -> list[int]:
    """Some often, some twice in a row, some once, and a shift in the middle."""
    requests: list[int] = []
    for i in range(num):
        base = 1000 if i > num // 2 else 0
        kind = rng.random()
        once = 10_000 + i
        requests += ([base + min(int(rng.expovariate(0.08)), 200)] if kind < 0.6 else
                     [once, once] if kind < 0.75 else [requests[-rng.randrange(1, 40)]] if kind < 0.85 and i > 40 else
                     [once])
    return requests


@pytest.mark.parametrize(("policy", "slow"), [(ARC, SlowARC), (S3FIFO, SlowS3FIFO)], ids=["arc", "s3-fifo"])
@pytest.mark.parametrize("size", [1, 2, 5, 10, 37])
def test_it_hits_what_the_published_algorithm_hits(policy, slow, size):
    for seed in range(4):
        requests = traffic(random.Random(seed), 700)
        model = slow(size)
        expected = [model.request(x) for x in requests]
        assert hits(policy(size), size, requests) == expected
        assert sum(expected) > 20
