"""A tier's owner as eviction policies see it, which checks every answer; and slow models of the policies."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from xllm.kv.eviction import EvictionPolicy

Content = tuple[int, ...]  # a path from the root; its prefixes are its ancestors


def digest_of(content: Content) -> bytes:
    return random.Random(repr(content)).randbytes(16)


class Model:
    """Chooses victims by searching all that is evictable. `owner` is set by the owner."""

    owner: Owner

    def choose(self, idle: list[Content]) -> Content:
        """The next victim. `idle`: what is evictable, in the order of retirement."""
        raise NotImplementedError

    def admitted(self, content: Content) -> None: ...

    def used(self, path: Sequence[Content]) -> None: ...

    def retired(self, content: Content) -> None: ...

    def gone(self, content: Content) -> None: ...


class Owner:
    """Holds paths of contents in places, like the block pool and the storage tiers do."""

    def __init__(self, policy: EvictionPolicy, num_places: int, model: Model | None = None):
        self.policy, self.model = policy, model
        self.place_of: dict[Content, int] = {}
        self.free = list(range(num_places))
        self.holders: dict[Content, int] = {}
        self.idle: list[Content] = []  # in the order of retirement
        self.rows: list[list[Content]] = []
        self.num_evicted = self.num_hits = 0
        if model is not None:
            model.owner = self

    def children(self, content: Content) -> list[Content]:
        return [c for c in self.place_of if len(c) == len(content) + 1 and c[:-1] == content]

    def places(self, path: Sequence[Content]) -> np.ndarray:
        return np.array([self.place_of[content] for content in path], dtype=np.int32)

    def enter(self, tokens: Content) -> None:
        """A request takes its path; what does not fit is cut off."""
        path = [tokens[: i + 1] for i in range(len(tokens))]
        known = next((i for i, c in enumerate(path) if c not in self.place_of), len(path))
        self.num_hits += known
        self.policy.revive(self.places(path[:known]))
        for content in path[:known]:
            self.holders[content] += 1
            if content in self.idle:
                self.idle.remove(content)
        path = path[: known + len(self.free) + len(self.idle)]
        self.evict(len(path) - known - len(self.free))
        for content in path[known:]:
            self.place_of[content] = self.free.pop()
            self.holders[content] = 1
        new = path[known:]
        if new:
            parents = [self.place_of[c[:-1]] if len(c) > 1 else -1 for c in new]
            self.policy.admit(self.places(new), [digest_of(c) for c in new], np.array(parents, dtype=np.int32))
            for content in new:
                self.tell("admitted", content)
        self.rows.append(path)
        self.check()

    def leave(self, which: int, *, used: bool = True) -> None:
        path = self.rows.pop(which)
        if used:
            self.policy.use(self.places(path))
            self.tell("used", path)
        for content in path:
            self.holders[content] -= 1
        tail_first = [content for content in path[::-1] if not self.holders[content]]
        self.policy.retire(self.places(tail_first))
        self.idle += tail_first
        for content in tail_first:
            self.tell("retired", content)
        self.check()

    def evict(self, num: int) -> None:
        if num <= 0:
            return
        places = self.policy.victims(num)
        assert places.dtype == np.int32
        assert len(places) == min(num, len(self.idle))
        content_at = {place: content for content, place in self.place_of.items()}
        for place in places.tolist():
            content = content_at[place]
            assert content in self.idle, "a victim is held"
            assert not self.children(content), "a victim's child remains"
            if self.model is not None:
                assert content == self.model.choose(self.idle)
            self.idle.remove(content)
            self.num_evicted += 1
            self.empty(content)

    def forget(self, content: Content) -> None:
        """The owner empties an idle place with all that is below."""
        below = [c for c in self.place_of if c[: len(content)] == content]
        places = self.places(below)
        self.policy.revive(places)
        self.policy.forget(places)
        for c in below:
            self.idle.remove(c)
            self.empty(c)
        self.check()

    def empty(self, content: Content) -> None:
        self.free.append(self.place_of.pop(content))
        del self.holders[content]
        self.tell("gone", content)

    def tell(self, what: str, about: object) -> None:
        if self.model is not None:
            getattr(self.model, what)(about)

    def check(self) -> None:
        assert len(self.policy) == len(self.idle)


def drive(owner: Owner, rng: random.Random, num_operations: int, *, forgets: bool = True) -> None:
    """Random requests over a forest of contents, several at a time; some are no uses (preempted)."""
    for _ in range(num_operations):
        roll = rng.random()
        if roll < 0.5 and len(owner.rows) < 4:
            depth = rng.randrange(1, 7)
            owner.enter((rng.randrange(4), *(rng.choice((0, 0, 0, 1, 2)) for _ in range(depth - 1))))
        elif roll < 0.9 and owner.rows:
            owner.leave(rng.randrange(len(owner.rows)), used=rng.random() < 0.9)
        elif roll < 0.95 and owner.idle and forgets:
            owner.forget(rng.choice(owner.idle))
        elif owner.idle:
            owner.evict(rng.randrange(1, 4))
    while owner.rows:
        owner.leave(0)
    owner.evict(len(owner.idle))
    owner.check()
    assert not owner.place_of


class LRUModel(Model):
    def choose(self, idle: list[Content]) -> Content:
        return idle[0]


class LRUKModel(Model):
    """Remembers every use for ever; they count again with the first use after an eviction."""

    def __init__(self, k: int):
        self.k, self.now = k, 0
        self.uses: dict[Content, list[int]] = {}
        self.unused: set[Content] = set()  # since they came in

    def admitted(self, content: Content) -> None:
        self.unused.add(content)

    def used(self, path: Sequence[Content]) -> None:
        self.now += 1
        for content in path:
            self.uses.setdefault(content, []).append(self.now)
            self.unused.discard(content)

    def choose(self, idle: list[Content]) -> Content:
        def kth_last_use(content: Content) -> int:
            uses = self.uses.get(content, [])
            return uses[-self.k] if len(uses) >= self.k and content not in self.unused else 0

        return min(idle, key=kth_last_use)  # the first of several: retired first


class LFUModel(Model):
    def __init__(self) -> None:
        self.num_uses: dict[Content, int] = {}

    def admitted(self, content: Content) -> None:
        self.num_uses[content] = 0

    def used(self, path: Sequence[Content]) -> None:
        for content in path:
            self.num_uses[content] += 1

    def choose(self, idle: list[Content]) -> Content:
        return min(idle, key=lambda content: self.num_uses[content])


class FIFOModel(Model):
    """The oldest goes. One whose turn came while it was held or had children is next as soon as it can go."""

    def __init__(self) -> None:
        self.line: list[Content] = []
        self.passed: list[Content] = []
        self.next: list[Content] = []

    def admitted(self, content: Content) -> None:
        self.line.append(content)

    def retired(self, content: Content) -> None:
        self.look_at_passed()

    def gone(self, content: Content) -> None:
        for queue in (self.line, self.passed, self.next):
            if content in queue:
                queue.remove(content)
        self.look_at_passed()

    def can_go(self, content: Content) -> bool:
        return content in self.owner.idle and not self.owner.children(content)

    def look_at_passed(self) -> None:
        for content in [c for c in self.passed if self.can_go(c)]:
            self.passed.remove(content)
            self.next.append(content)

    def choose(self, idle: list[Content]) -> Content:
        while True:
            content = self.next[0] if self.next else self.line[0]
            if self.can_go(content):
                return content
            (self.next or self.line).remove(content)
            self.passed.append(content)
