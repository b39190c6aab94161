"""The global index against a slow model of dictionaries, with room for everything and with too little of it."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest

from xllm.kv.block import TIERS, block_digests
from xllm.routing.global_index import MAX_INSTANCES, SWEEP_PLACES, GlobalIndex, Matches, TierChange, digest_keys
from xllm.routing.key_table import KeyTable

NONE = np.zeros(0, dtype=np.uint64)


def random_keys(rng: random.Random, num_keys: int) -> np.ndarray:
    return np.array([rng.getrandbits(64) | 1 for _ in range(num_keys)], dtype=np.uint64)


class SlowIndex:
    """What `GlobalIndex` is, by sets; never full."""

    def __init__(self) -> None:
        self.blocks: dict[str, list[set[int]]] = {}

    def forget(self, name: str) -> None:
        self.blocks.pop(name, None)  # as the index does, it is the last one again
        self.blocks[name] = [set() for _ in TIERS]

    def change(self, name: str, changes: list[TierChange]) -> None:
        for change in changes:
            self.blocks[name][change.tier] -= set(change.removed.tolist())
            self.blocks[name][change.tier] |= set(change.stored.tolist())

    def match(self, name: str, keys: list[int]) -> list[int]:
        runs = []
        for tier in range(len(TIERS)):
            reachable = set[int]().union(*self.blocks[name][: tier + 1])
            runs.append(next((place for place, key in enumerate(keys) if key not in reachable), len(keys)))
        return runs

    def __len__(self) -> int:
        return len(set[int]().union(*(tier for tiers in self.blocks.values() for tier in tiers)))


def operate(rng: random.Random, index: GlobalIndex, slow: SlowIndex, texts: list[np.ndarray]) -> None:
    """One random operation on both."""
    names = list(slow.blocks)
    kind = rng.random()
    if not names or kind < 0.02:
        name = rng.choice(["a", "b", "c", "d", "e", "f"])
        index.forget(name)
        slow.forget(name)
        return
    if kind < 0.03:
        name = rng.choice(names)
        index.leave(name)
        del slow.blocks[name]
        return
    text = rng.choice(texts)
    first, last = sorted(rng.choices(range(len(text) + 1), k=2))
    if kind < 0.3:
        query = text[:last]
        found = index.match(query)
        assert set(found.names) == set(names)
        for place, name in enumerate(found.names):
            assert found.blocks_TI[:, place].tolist() == slow.match(name, query.tolist())
        return
    piece = text[first:last] if rng.random() < 0.7 else np.array(rng.choices(text.tolist(), k=5), dtype=np.uint64)
    stores = rng.random() < 0.55
    change = TierChange(rng.randrange(len(TIERS)), piece if stores else NONE, NONE if stores else piece)
    name = rng.choice(names)
    index.change(name, [change])
    slow.change(name, [change])


def compare_at_random(seed: int, num_operations: int) -> None:
    rng = random.Random(seed)
    index, slow = GlobalIndex(3000), SlowIndex()
    texts = [random_keys(rng, 40) for _ in range(25)]
    texts += [np.concatenate((rng.choice(texts)[: rng.randrange(40)], random_keys(rng, 30))) for _ in range(25)]
    for _ in range(num_operations):
        operate(rng, index, slow, texts)
    for name, tiers in slow.blocks.items():
        for tier, keys in enumerate(tiers):
            assert set(index.keys_of(name, tier).tolist()) == keys
    index._sweep(index._table.num_places)
    assert len(index) == len(slow) and index.num_evicted == 0


@pytest.mark.parametrize("seed", range(2))
def test_it_answers_as_a_slow_model(seed: int) -> None:
    compare_at_random(seed, 50_000 if os.environ.get("INDEX_ALL") else 5_000)


def test_too_many_blocks_push_out_the_oldest_and_nothing_is_made_up() -> None:
    now = [0.0]
    index, rng = GlobalIndex(1000, clock=lambda: now[0]), random.Random(0)
    index.forget("a")
    index.forget("b")
    num_bytes, texts = index.num_bytes, [random_keys(rng, 100) for _ in range(40)]
    hot = texts[0]
    for text in texts:
        now[0] += 10
        index.change("a", [TierChange(0, text)])
        index.match(hot)
    assert index.num_bytes == num_bytes <= 120 * 1000
    assert index.num_evicted == 4000 - len(index) and 1000 <= len(index) <= index._table.num_places
    assert index.match(hot).blocks_TI.tolist() == [[100, 0]] * 3, "what is asked for stays"
    assert index.match(texts[-1]).blocks_TI[0, 0] == 100
    assert index.match(texts[1]).blocks_TI[0, 0] < 50, "what is old has gone"
    assert not index.has("b", 0, np.concatenate(texts)).any() and not index.has("a", 1, np.concatenate(texts)).any()
    index.change("a", [TierChange(0, NONE, np.concatenate(texts))])
    assert len(index) == 0


def test_what_has_gone_is_out_at_once_and_cleared_bit_by_bit() -> None:
    rng = random.Random(0)
    index, text = GlobalIndex(20 * SWEEP_PLACES), random_keys(rng, 5000)
    for name in ("a", "b"):
        index.forget(name)
        index.change(name, [TierChange(2, text)])
    index.change("b", [TierChange(2, NONE, text[100:])])
    index.forget("a")
    assert index.match(text).blocks_TI[2].tolist() == [100, 0] and len(index) == 5000
    num_changes = 0
    while index.is_clearing:
        index.change("b", [])
        num_changes += 1
    assert len(index) == 100 and 2 < num_changes <= index._table.num_places // SWEEP_PLACES + 1


def test_every_bit_of_a_word_can_be_had_again() -> None:
    rng = random.Random(0)
    index, text = GlobalIndex(5000), random_keys(rng, 300)
    for number in range(MAX_INSTANCES):
        index.forget(str(number))
        index.change(str(number), [TierChange(number % 3, text[: number * 4])])
    with pytest.raises(ValueError, match="at most 64"):
        index.forget("another")
    found = index.match(text)
    assert found.blocks_TI[2].tolist() == [number * 4 for number in range(MAX_INSTANCES)]
    for number in range(0, MAX_INSTANCES, 3):  # each time all bits are in use, or wait to be cleared
        index.forget(str(number))
        assert index.match(text).blocks_TI[2, index.names.index(str(number))] == 0
    index.leave("5")
    index.forget("another")
    assert "5" not in index.names and index.match(text).blocks_TI[2, index.names.index("another")] == 0
    with pytest.raises(KeyError):
        index.change("5", [])


def test_a_tier_counts_by_what_loading_saves() -> None:
    found = Matches(("a", "b"), np.array([[10, 0], [30, 0], [30, 100]]))
    assert found.saved([0.0, 0.25, 0.5]).tolist() == [10 + 20 * 0.75, 50.0]
    assert found.saved([0.0, 0.25, 3.0]).tolist() == [25.0, 0.0], "what is loaded later than computed is computed"
    assert found.saved(np.array([[0.0, 0.0], [1.0, 1.0], [0.5, 0.9]])).tolist() == [10.0, pytest.approx(10.0)]


def test_keys_are_the_low_halves_of_digests() -> None:
    digests = block_digests(np.arange(64, dtype=np.int32), 16)
    assert digest_keys(b"".join(digests)).tolist() == [int.from_bytes(digest[8:], "big") for digest in digests]
    assert digest_keys(bytes(16)).tolist() == [1], "0 is no key"


def test_a_table_that_is_as_full_as_planned_loses_nothing() -> None:
    rng = np.random.default_rng(0)
    table, keys = KeyTable(20_000), np.unique(rng.integers(1, 2**64, size=20_000, dtype=np.uint64))
    for part in np.array_split(rng.permutation(keys), 300):
        _, evicted = table.insert(part, 1)
        assert not len(evicted)
    places = table.find(keys)
    assert (table.keys[places] == keys).all() and len(np.unique(places)) == len(keys) == len(table)
    table.remove(places[::2])
    assert (table.find(keys)[::2] == -1).all() and (table.find(keys)[1::2] == places[1::2]).all()
