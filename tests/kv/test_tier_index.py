"""`TierIndex` against a dictionary, with every eviction policy; and what it takes over from an earlier life."""

import hashlib
import random
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from xllm.config import EVICTION_POLICIES
from xllm.errors import IntegrityError
from xllm.kv.eviction import make_policy
from xllm.kv.tier_index import NO_SLOT, TierIndex

ROOT = bytes(16)
CHOICE = st.integers(0, 1000)


def digest_of(name: tuple[int, ...]) -> bytes:
    """A block is named by the turns that lead to it; its parent's name is one shorter."""
    return hashlib.blake2b(repr(name).encode(), digest_size=16).digest() if name else ROOT


class Held:
    """A path that somebody holds: names and slots, root first."""

    def __init__(self, names: list[tuple[int, ...]], slots: list[int]):
        self.names, self.slots = names, slots


class TierMachine(RuleBasedStateMachine):
    """`resident`: {name: slot} of what must be findable. `doomed`: slots found broken while held."""

    policy = "lru"
    l1_share = 0.0

    def __init__(self):
        super().__init__()
        self.resident: dict[tuple[int, ...], int] = {}
        self.doomed: set[int] = set()
        self.writing: list[np.ndarray] = []
        self.held: list[Held] = []
        self.removed: dict[int, bytes] = {}

    @initialize(num_slots=st.integers(1, 12))
    def begin(self, num_slots):
        self.num_slots = num_slots
        self.index = self.make()

    def make(self):
        return TierIndex(self.num_slots, make_policy(self.policy, self.num_slots, l1_share=self.l1_share),
                         self.on_remove)

    def on_remove(self, slots):
        for slot in slots.tolist():
            assert slot not in self.removed
            self.removed[slot] = self.index.digest_of(slot)

    # --- what the model says

    def holders(self) -> np.ndarray:
        counts = np.zeros(self.num_slots, dtype=int)
        for path in self.held:
            np.add.at(counts, path.slots, 1)
        return counts

    @property
    def num_writing(self) -> int:
        return sum(map(len, self.writing))

    @property
    def num_free(self) -> int:
        return self.num_slots - self.num_writing - len(self.resident) - len(self.doomed)

    @property
    def num_idle(self) -> int:
        holders = self.holders()
        return sum(holders[slot] == 0 for slot in self.resident.values())

    def take_removed(self, num_expected: int | None = None) -> None:
        """What the index has said to be gone leaves the model too: nothing held, no parent before its child."""
        removed, self.removed = self.removed, {}
        name_of = {slot: name for name, slot in self.resident.items()}
        holders = self.holders()
        for slot, digest in removed.items():
            assert holders[slot] == 0, "evicted under somebody's hands"
            assert digest == digest_of(name_of[slot])
            del self.resident[name_of[slot]]
        assert num_expected is None or len(removed) == num_expected
        assert all(name[:-1] in self.resident for name in self.resident if len(name) > 1)

    def path_of(self, name) -> list[tuple[int, ...]]:
        return [name[: i + 1] for i in range(len(name))]

    # --- operations

    @rule(num=st.integers(0, 6))
    def reserve(self, num):
        given = min(num, self.num_free + self.num_idle)
        evicted = max(0, given - self.num_free)
        before = self.index.num_evicted
        slots = self.index.reserve(num)
        self.take_removed(evicted)
        assert len(slots) == len(set(slots.tolist())) == given
        assert self.index.num_evicted == before + evicted
        assert not set(slots.tolist()) & (set(self.resident.values()) | self.doomed)
        if len(slots):
            self.writing.append(slots)

    @precondition(lambda self: self.writing)
    @rule(choice=CHOICE, behind=CHOICE, turns=st.lists(st.integers(0, 1), min_size=6, max_size=6))
    def publish(self, choice, behind, turns):
        slots = self.writing.pop(choice % len(self.writing))
        path = (self.held[behind % len(self.held)] if self.held and behind % 3 else Held([], []))
        tail = path.names[-1] if path.names else ()
        names = [tail + tuple(turns[: i + 1]) for i in range(len(slots))]
        parent = path.slots[-1] if path.slots else NO_SLOT
        broken = parent in self.doomed
        places = self.index.publish(slots, [digest_of(name) for name in names], parent).tolist()
        self.take_removed(0)
        expected = [] if broken else [self.resident.get(n, int(s)) for n, s in zip(names, slots.tolist())]
        assert places == expected
        self.resident.update(zip(names, places))
        if path not in self.held:
            self.held.append(path)
        path.names += names[: len(places)]
        path.slots += places
        if not path.slots:
            self.held.remove(path)

    @precondition(lambda self: self.writing)
    @rule(choice=CHOICE)
    def abandon(self, choice):
        self.index.abandon(self.writing.pop(choice % len(self.writing)))

    @precondition(lambda self: self.resident)
    @rule(choice=CHOICE)
    def hold(self, choice):
        names = self.path_of(sorted(self.resident)[choice % len(self.resident)])
        slots = self.index.path(self.index.find(digest_of(names[-1])))
        assert slots.tolist() == [self.resident[name] for name in names]
        self.index.hold(slots)
        self.held.append(Held(names, slots.tolist()))

    @precondition(lambda self: self.held)
    @rule(choice=CHOICE)
    def let_go(self, choice):
        path = self.held.pop(choice % len(self.held))
        self.index.let_go(np.array(path.slots, dtype=np.int32))
        self.doomed -= {slot for slot in path.slots if self.holders()[slot] == 0}
        self.take_removed(0)

    @precondition(lambda self: self.held)
    @rule(choice=CHOICE)
    def use_held(self, choice):
        self.index.use(np.array(self.held[choice % len(self.held)].slots, dtype=np.int32))

    @precondition(lambda self: self.resident)
    @rule(choice=CHOICE)
    def use(self, choice):
        name = sorted(self.resident)[choice % len(self.resident)]
        self.index.use(np.array([self.resident[n] for n in self.path_of(name)], dtype=np.int32))

    @precondition(lambda self: self.resident)
    @rule(choice=CHOICE)
    def drop(self, choice):
        broken = sorted(self.resident)[choice % len(self.resident)]
        below = {name for name in self.resident if name[: len(broken)] == broken}
        holders = self.holders()
        assert self.index.drop(self.resident[broken]) == len(below)
        assert self.removed == {self.resident[name]: digest_of(name) for name in below}
        self.removed = {}
        self.doomed |= {self.resident[name] for name in below if holders[self.resident[name]]}
        for name in below:
            del self.resident[name]

    @rule()
    def clear(self):
        self.index.clear()
        self.take_removed(self.num_idle)

    @rule(seed=st.integers(0, 2**20))
    def restart(self, seed):
        """A new index takes over what the old one had, and ignores orphans."""
        rng = random.Random(seed)
        entries = [(slot, digest_of(name), digest_of(name[:-1])) for name, slot in self.resident.items()]
        free = sorted(set(range(self.num_slots)) - set(self.resident.values()))
        orphans = rng.sample(free, rng.randint(0, len(free)))
        entries += [(slot, rng.randbytes(16), rng.randbytes(16)) for slot in orphans]
        rng.shuffle(entries)
        self.index = self.make()
        self.held, self.writing, self.doomed = [], [], set()
        assert self.index.adopt(*map(list, zip(*entries)) if entries else ([], [], [])) == len(self.resident)

    # --- what holds at all times

    @invariant()
    def agrees_with_the_model(self):
        if not hasattr(self, "index"):
            return
        index = self.index
        index.check_integrity()
        assert len(index) == len(self.resident)
        for name, slot in self.resident.items():
            assert index.find(digest_of(name)) == slot and index.digest_of(slot) == digest_of(name)
            assert index.parent_of[slot] == (self.resident[name[:-1]] if len(name) > 1 else NO_SLOT)
        assert index.find(digest_of((9,))) == NO_SLOT
        assert index.num_available == self.num_free + self.num_idle
        assert index.num_held == self.num_slots - index.num_available
        assert np.array_equal(index._holders, self.holders())

    def teardown(self):
        if not hasattr(self, "index"):
            return
        while self.held:
            self.let_go(0)
        for slots in self.writing:
            self.index.abandon(slots)
        assert self.index.num_available == self.num_slots and self.index.num_held == 0
        assert len(self.index.reserve(self.num_slots + 1)) == self.num_slots
        self.take_removed()
        assert not self.resident and not len(self.index)


POLICIES = pytest.mark.parametrize(("policy", "l1_share"), [(name, 0.0) for name in EVICTION_POLICIES] + [("lru", 0.4)])


@POLICIES
def test_against_a_dictionary(policy, l1_share):
    machine = type("Machine", (TierMachine,), {"policy": policy, "l1_share": l1_share})
    case = machine.TestCase
    case.settings = settings(max_examples=15, stateful_step_count=30, deadline=None, database=None, derandomize=True,
                             suppress_health_check=list(HealthCheck))  # fmt: skip
    case().runTest()


WEIGHTS = {"reserve": 8, "publish": 10, "abandon": 1, "hold": 4, "let_go": 5, "use_held": 1, "use": 2, "drop": 0.6,
           "clear": 0.1, "restart": 0.1}  # fmt: skip
NEEDS = {"publish": "writing", "abandon": "writing", "let_go": "held", "use_held": "held", "hold": "resident",
         "use": "resident", "drop": "resident"}  # fmt: skip


def arguments_of(name: str, rng: random.Random) -> dict:
    if name == "reserve":
        return {"num": rng.choice([0, 1, 1, 2, 3, 6])}
    if name == "publish":
        return {"choice": rng.randrange(1000), "behind": rng.randrange(1000), "turns": rng.choices([0, 1], k=6)}
    if name == "restart":
        return {"seed": rng.randrange(2**20)}
    return {} if name == "clear" else {"choice": rng.randrange(1000)}


def walk(machine: TierMachine, rng: random.Random, num_operations: int) -> None:
    """The same machine driven evenly, so that it gets to where much is held, doomed and written at once."""
    machine.begin(rng.randint(1, 12))
    for _ in range(num_operations):
        (name,) = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))
        if name not in NEEDS or getattr(machine, NEEDS[name]):
            getattr(machine, name)(**arguments_of(name, rng))
        machine.agrees_with_the_model()
    machine.teardown()


@POLICIES
def test_walks_against_a_dictionary(policy, l1_share):
    for seed in range(12):
        machine = type("Machine", (TierMachine,), {"policy": policy, "l1_share": l1_share})()
        try:
            walk(machine, random.Random(seed), 100)
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error


# --- what an earlier life left


def make_index(num_slots: int, removed: list | None = None) -> TierIndex:
    def on_remove(slots):
        if removed is not None:
            removed.extend(slots.tolist())

    return TierIndex(num_slots, make_policy("lru", num_slots), on_remove)


def block(number: int) -> bytes:
    return number.to_bytes(16, "big") if number else ROOT


@pytest.mark.parametrize("order", [lambda e: e, lambda e: e[::-1], lambda e: random.Random(1).sample(e, len(e))],
                         ids=["root-first", "tail-first", "any"])
def test_adopts_trees_and_nothing_else(order):
    tree = [(0, 1, 0), (1, 2, 1), (2, 3, 2), (3, 4, 2), (4, 5, 0)]
    orphans = [(5, 20, 99), (6, 21, 20), (7, 22, 21)]
    cycles = [(8, 30, 31), (9, 31, 32), (10, 32, 30), (11, 33, 33), (12, 34, 33)]
    entries = order(tree + orphans + cycles)
    index = make_index(16)
    assert index.adopt([e[0] for e in entries], [block(e[1]) for e in entries], [block(e[2]) for e in entries]) == 5
    index.check_integrity()
    assert {index.find(block(digest)) for _, digest, _ in tree} == {0, 1, 2, 3, 4}
    assert all(index.find(block(digest)) == NO_SLOT for _, digest, _ in orphans + cycles)
    assert index.path(2).tolist() == [0, 1, 2]
    assert index.num_available == 16
    assert sorted(index.reserve(11).tolist()) == list(range(5, 16)), "what was not taken over is free"


def test_the_newest_of_several_copies_counts():
    index = make_index(4)
    assert index.adopt([2, 0, 3], [block(1), block(2), block(1)], [ROOT, block(1), ROOT]) == 2
    assert index.find(block(1)) == 3 and index.path(0).tolist() == [3, 0]
    assert set(index.reserve(2).tolist()) == {1, 2}


def test_the_oldest_of_an_earlier_life_go_first():
    """A parent is as young as its youngest descendant."""
    removed: list[int] = []
    index = make_index(5, removed)
    #          a chain with an old root    an old leaf         a young leaf of the old root
    entries = [(0, 1, 0), (1, 2, 1), (2, 5, 0), (3, 6, 0), (4, 3, 1)]
    index.adopt([e[0] for e in entries], [block(e[1]) for e in entries], [block(e[2]) for e in entries])
    for _ in range(5):
        index.reserve(1)
    assert removed == [1, 2, 3, 4, 0]


def test_adopts_a_hundred_thousand_blocks_in_time():
    """Conversations of 200 blocks that share a system prompt of 20, in random order of writing."""
    rng = random.Random(0)
    entries, number = [], 0
    for _ in range(556):
        parent = 0
        for depth in range(200):
            if depth < 20:
                digest = depth + 1
            else:
                number += 1
                digest = 1000 + number
            if depth >= 20 or len(entries) < 20:
                entries.append((digest, parent))
            parent = digest
    del entries[100_000:]
    rng.shuffle(entries)
    index = make_index(len(entries))
    began = time.perf_counter()
    kept = index.adopt(list(range(len(entries))), [block(d) for d, _ in entries], [block(p) for _, p in entries])
    took_s = time.perf_counter() - began
    assert kept == len(entries) == 100_000
    index.check_integrity()
    assert took_s < 10.0, "two seconds on an idle machine"
    assert len(index.path(index.find(block(1000 + 180)))) == 200


def test_a_long_chain_is_no_deeper_than_the_stack():
    num = 20_000
    index = make_index(num)
    order = list(range(num))
    random.Random(2).shuffle(order)
    assert index.adopt(order, [block(i + 1) for i in order], [block(i) for i in order]) == num
    index.check_integrity()
    assert index.drop(index.find(block(2))) == num - 1
    index.check_integrity()
    assert len(index) == 1


def test_the_audit_finds_a_block_without_its_parent():
    index = make_index(3)
    index.adopt([0, 1], [block(1), block(2)], [ROOT, block(1)])
    index.parent_of[1] = 2
    with pytest.raises(IntegrityError, match="lacks its parent"):
        index.check_integrity()
