"""What a router believes of engines, against what their caches hold: marks of prompts, promises of waiting requests,
and events of a real cache."""

from __future__ import annotations

import random
from array import array

import numpy as np
import pytest

from tests.kv.driver import Driver
from tests.kv.test_events import operate
from xllm.kv.block import block_digests, salt_with_adapter
from xllm.kv.event_log import KVEventLog
from xllm.routing.engine_view import EngineView
from xllm.routing.prompt_marks import NO_MARKS, prompt_marks
from xllm.routing.router import Router

BLOCK = 4


def tokens(num_blocks: int, seed: int = 0, extra: int = 0) -> array[int]:
    rng = random.Random(seed)
    return array("i", [rng.randrange(100) for _ in range(num_blocks * BLOCK + extra)])


def joined(token_ids: array[int], salt: str = "") -> bytes:
    return b"".join(block_digests(np.asarray(token_ids), BLOCK, salt))


@pytest.mark.parametrize("num_blocks", [0, 1, 63, 64, 65, 72, 511, 512, 575, 576, 700])
def test_marks_are_digests_of_the_cache(num_blocks: int) -> None:
    prompt = tokens(num_blocks, extra=3)
    digests = block_digests(np.asarray(prompt), BLOCK, "salt")
    marks = prompt_marks(prompt, BLOCK, "salt")
    assert marks.digests == [digests[num // BLOCK - 1] for num in marks.num_tokens]
    assert marks.num_tokens[:64] == [BLOCK * (i + 1) for i in range(min(64, num_blocks))]
    longest = marks.num_tokens[-1] // BLOCK if marks.num_tokens else 0
    assert num_blocks - longest < (1 if num_blocks <= 64 else 8 if num_blocks <= 512 else 64)
    longer = prompt_marks(prompt + tokens(200, seed=1), BLOCK, "salt")
    assert longer.digests[: len(marks.digests)] == marks.digests, "equal prefixes have equal marks"


def test_callers_and_adapters_do_not_match_each_other() -> None:
    prompt, view = tokens(6), EngineView()
    view.change(0, joined(prompt, "alice") + joined(prompt, salt_with_adapter("alice", "d1")), b"")
    found = {(salt, adapter): view.matched_tokens(prompt_marks(prompt, BLOCK, salt, adapter))
             for salt in ("alice", "bob", "") for adapter in ("", "d1", "d2")}
    assert {key for key, num_tokens in found.items() if num_tokens} == {("alice", ""), ("alice", "d1")}
    assert found["alice", "d1"] == 6 * BLOCK


def test_prefixes_of_any_length_are_found_to_the_mark_below() -> None:
    prompt = tokens(700)
    digests, marks = block_digests(np.asarray(prompt), BLOCK), prompt_marks(prompt, BLOCK)
    for num_blocks in (0, 1, 5, 64, 66, 72, 79, 80, 513, 576, 639, 640, 700):
        view = EngineView()
        view.change(num_blocks % 3, b"".join(digests[:num_blocks]), b"")
        assert view.matched_tokens(marks) == max([0, *(n for n in marks.num_tokens if n <= num_blocks * BLOCK)])
        view.change(num_blocks % 3, b"", b"".join(digests[num_blocks // 2 : num_blocks]))
        assert view.matched_tokens(marks) <= num_blocks // 2 * BLOCK
        view.forget()
        assert len(view) == view.matched_tokens(marks) == 0


def test_a_waiting_request_promises_its_prompt() -> None:
    view, one = EngineView(), tokens(8)
    marks, other = prompt_marks(one, BLOCK), prompt_marks(one[: 4 * BLOCK] + tokens(4, seed=9), BLOCK)
    view.enter("a", 32, marks)
    view.enter("b", 16, other)
    view.enter("c", 0, NO_MARKS)
    assert (view.num_open, view.waiting_tokens) == (3, 48)
    assert view.matched_tokens(marks) == view.matched_tokens(other) == 32
    view.begun("a")
    view.begun("a")
    assert (view.num_open, view.waiting_tokens) == (3, 16)
    assert (view.matched_tokens(marks), view.matched_tokens(other)) == (16, 32), "what both have, one still promises"
    view.left("b")
    view.left("nobody")
    assert (view.num_open, view.waiting_tokens, view.matched_tokens(other)) == (2, 0, 0)
    view.left("a")
    view.left("c")
    assert view.num_open == 0 and not view._promised


@pytest.mark.parametrize("seed", range(8))
def test_events_in_batches_leave_what_the_cache_has(seed: int) -> None:
    rng, view = random.Random(seed), EngineView()
    driver = Driver(num_blocks=rng.choice([4, 10, 30]), block_size=rng.choice([1, 2]), num_rows=4)
    for _ in range(rng.choice([0, 40])):
        operate(driver, rng)
    log = KVEventLog(driver.kv)
    for _ in range(60):
        for _ in range(rng.randrange(12)):
            operate(driver, rng)
        for change in log.take():
            view.change(change.tier, b"".join(change.stored), b"".join(change.removed))
        index = driver.kv._index
        blocks = np.flatnonzero(index.contains(np.arange(len(index._parent_of)))).tolist()
        assert view._cached[0] == {index.digest_of(block) for block in blocks}
    assert log.take() == []


def test_a_block_in_two_tiers_is_gone_when_both_have_lost_it() -> None:
    view, prompt = EngineView(), tokens(1)
    marks, digest = prompt_marks(prompt, BLOCK), joined(prompt)
    view.change(0, digest, b"")
    view.change(1, digest, b"")
    assert (len(view), view.matched_tokens(marks)) == (1, BLOCK)
    view.change(0, b"", digest)
    assert (len(view), view.matched_tokens(marks)) == (1, BLOCK)
    view.change(1, b"", digest)
    assert len(view) == view.matched_tokens(marks) == 0


@pytest.mark.parametrize(("max_waiting", "max_open"), [(4, 100), (100, 4)])
def test_the_router_passes_by_those_that_may_not_be_chosen(max_waiting: int, max_open: int) -> None:
    router, ample = Router(EngineView(max_waiting=max_waiting, max_open=max_open) for _ in range(3)), 1000
    assert [router.pick([NO_MARKS], 5, 1, dict.fromkeys(range(3), ample)) for _ in range(4)] == [0, 1, 2, 0]
    assert [router.pick([NO_MARKS], 5, 1, {0: ample, 2: ample}) for _ in range(3)] == [2, 0, 2]
    marks = prompt_marks(tokens(50), BLOCK)
    router.views[2].change(0, joined(tokens(50)), b"")
    assert router.pick([marks], 200, 1, dict.fromkeys(range(3), ample)) == 2
    assert router.pick([marks], 200, 1, {0: ample, 1: ample}) in (0, 1)
    for name in "abcd":
        router.views[2].enter(name, 0, NO_MARKS)
    assert router.pick([marks], 200, 1, dict.fromkeys(range(3), ample)) != 2, "it is full"
