"""The table of past uses: exact while it has room, bounded, and forgetful by age."""

from __future__ import annotations

import random

import numpy as np
import pytest

from xllm.kv.eviction.history import WAYS, History, content_keys


def keys_of(contents: list[int]) -> np.ndarray:
    return content_keys([random.Random(content).randbytes(16) for content in contents])


@pytest.mark.parametrize("k", [1, 2, 4])
def test_it_knows_every_use_while_it_has_room(k):
    rng, history = random.Random(k), History(20_000, k)
    uses: dict[int, list[int]] = {}
    for now in range(1, 300):
        path = rng.sample(range(500), rng.randrange(1, 40))
        ids, new = history.touch(keys_of(path), now)
        assert len(ids) == len(set(ids.tolist())) == len(path)
        assert new.tolist() == [i for i, content in zip(ids.tolist(), path) if content not in uses]
        for content in path:
            uses.setdefault(content, []).append(now)
        expected = [uses[content][-k] if len(uses[content]) >= k else 0 for content in path]
        assert history.kth_use(ids).tolist() == expected


def test_it_remembers_about_as_many_contents_as_it_was_made_for():
    history = History(1000, 2)
    history.touch(keys_of(list(range(10_000))), 1)
    keys = keys_of(list(range(10_000)))
    _, new = history.touch(keys[-1000:], 2)
    assert np.count_nonzero(history._keys) == history.num_contents <= 1000 + WAYS
    assert len(new) > 0


def test_what_was_used_longest_ago_is_forgotten_first():
    """Of twice as many contents as fit, those that stay in use are kept and the others take turns."""
    history, now = History(1600, 2), 0
    often = list(range(400))
    for i in range(40):
        now += 1
        _, new = history.touch(keys_of(often), now)
        if i:
            assert not len(new)
        now += 1
        history.touch(keys_of([1000 + 200 * i + j for j in range(200)]), now)
    ids, new = history.touch(keys_of(list(range(1000, 1400))), now + 1)
    assert len(new) == 400  # 38 rounds ago
    assert not history.kth_use(ids).any()


def test_a_path_that_overflows_a_set_is_cut():
    """Every content of one request has an id of its own, or none."""
    history = History(64, 2)
    num_sets = history.num_contents // WAYS
    same_set = np.arange(1, 3 * WAYS + 1, dtype=np.uint64) * np.uint64(num_sets)
    ids, new = history.touch(same_set, 1)
    assert len(ids) == len(new) == len(set(ids.tolist())) <= WAYS
    ids, _ = history.touch(same_set[:WAYS], 2)
    assert len(ids) == len(set(ids.tolist()))


def test_ids_that_change_hands_are_told():
    """The shadows of a duel must forget what an id stood for."""
    history, owner_of = History(64, 2), {}
    rng = random.Random(3)
    for now in range(1, 200):
        path = rng.sample(range(300), 10)
        ids, new = history.touch(keys_of(path), now)
        told = set(new.tolist())
        for i, content in zip(ids.tolist(), path):
            assert owner_of.get(i) == content or i in told
            owner_of[i] = content


def test_keys_are_never_zero():
    assert content_keys([bytes(16), b"\x05" + bytes(15)]).tolist()[0] == 1
