"""What a router believes of caches, against what they hold: marks of prompts, promises of waiting requests, and events
of a real cache."""

from __future__ import annotations

import random

import numpy as np
import pytest

from tests.kv.driver import Driver
from tests.kv.test_events import operate
from tests.routing.test_fleet import BLOCK, fleet_of, joined, marked, tokens
from xllm.kv.block import TIERS, block_digests, salt_with_adapter
from xllm.kv.event_log import KVEventLog
from xllm.routing.fleet import Fleet
from xllm.routing.global_index import GlobalIndex, digest_keys
from xllm.routing.prompt_marks import NO_MARKS, PromptMarks, prompt_marks


def matched(fleet: Fleet, marks: PromptMarks) -> int:
    decision = fleet.decide([marks], 10**6, 1, 0.0)
    assert decision.name == "a"
    return decision.matched_tokens[0]


@pytest.mark.parametrize("num_blocks", [0, 1, 63, 64, 65, 72, 511, 512, 575, 576, 700])
def test_marks_are_digests_of_the_cache(num_blocks: int) -> None:
    prompt = tokens(num_blocks) + tokens(1)[:3]
    digests = block_digests(np.asarray(prompt), BLOCK, "salt")
    marks = prompt_marks(prompt, BLOCK, "salt")
    assert marks.digests == [digests[num // BLOCK - 1] for num in marks.num_tokens]
    assert marks.num_tokens[:64] == [BLOCK * (i + 1) for i in range(min(64, num_blocks))]
    longest = marks.num_tokens[-1] // BLOCK if marks.num_tokens else 0
    assert num_blocks - longest < (1 if num_blocks <= 64 else 8 if num_blocks <= 512 else 64)
    longer = prompt_marks(prompt + tokens(200, seed=1), BLOCK, "salt")
    assert longer.digests[: len(marks.digests)] == marks.digests, "equal prefixes have equal marks"


def test_callers_and_adapters_do_not_match_each_other() -> None:
    prompt, fleet = tokens(6), fleet_of("a")
    for salt in ("alice", salt_with_adapter("alice", "d1")):
        fleet.changed("a", 0, b"".join(block_digests(np.asarray(prompt), BLOCK, salt)), b"")
    found = {(salt, adapter): matched(fleet, prompt_marks(prompt, BLOCK, salt, adapter))
             for salt in ("alice", "bob", "") for adapter in ("", "d1", "d2")}
    assert {key for key, num_tokens in found.items() if num_tokens} == {("alice", ""), ("alice", "d1")}
    assert found["alice", "d1"] == 6 * BLOCK


def test_prefixes_of_any_length_are_found_to_the_mark_below() -> None:
    prompt = tokens(700)
    digests, marks = block_digests(np.asarray(prompt), BLOCK), marked(prompt)
    for num_blocks in (0, 1, 5, 64, 66, 72, 79, 80, 513, 576, 639, 640, 700):
        fleet = fleet_of("a")
        fleet.changed("a", num_blocks % 3, b"".join(digests[:num_blocks]), b"")
        assert matched(fleet, marks) == max([0, *(n for n in marks.num_tokens if n <= num_blocks * BLOCK)])
        fleet.changed("a", num_blocks % 3, b"", b"".join(digests[num_blocks // 2 : num_blocks]))
        assert matched(fleet, marks) <= num_blocks // 2 * BLOCK


def test_a_waiting_request_promises_its_prompt() -> None:
    fleet, one = fleet_of("a"), tokens(8)
    marks, other = marked(one), marked(one[: 4 * BLOCK] + tokens(4, seed=9))
    fleet.sent("a", "1", 32, marks)
    fleet.sent("a", "2", 16, other)
    fleet.sent("a", "3", 0, NO_MARKS)
    sent = fleet._instances["a"].sent
    assert (sent.num_open, sent.num_waiting, sent.waiting_tokens) == (3, 3, 48)
    assert matched(fleet, marks) == matched(fleet, other) == 32
    fleet.begun("a", "1")
    fleet.begun("a", "1")
    assert (sent.num_open, sent.waiting_tokens) == (3, 16)
    assert (matched(fleet, marks), matched(fleet, other)) == (16, 32), "what both have, one still promises"
    fleet.left("a", "2")
    fleet.left("a", "nobody")
    assert (sent.num_open, sent.waiting_tokens, matched(fleet, other)) == (2, 0, 0)
    fleet.left("a", "1")
    fleet.left("a", "3")
    assert sent.num_open == 0 and not sent._promised


def test_what_is_promised_and_what_is_cached_go_together() -> None:
    fleet, prompt = fleet_of("a"), tokens(20)
    fleet.changed("a", 2, joined(prompt[: 15 * BLOCK]), b"")
    fleet.sent("a", "1", 40, marked(prompt[: 10 * BLOCK]))
    snapshot = fleet._snapshot(("a",), [fleet._matched(marked(prompt))], 1, fleet._figures_of(("a",)))
    assert snapshot.device_tokens == [40] and 40 < snapshot.saved_tokens[0] < 60 == matched(fleet, marked(prompt))


@pytest.mark.parametrize("seed", range(4))
def test_events_in_batches_leave_what_the_cache_has(seed: int) -> None:
    rng, fleet = random.Random(seed), Fleet(index=GlobalIndex(5000))
    fleet.join("a", block_size=2, max_waiting=1, max_open=1, num_blocks=30)
    driver = Driver(num_blocks=rng.choice([4, 10, 30]), block_size=rng.choice([1, 2]), num_rows=4)
    for _ in range(rng.choice([0, 40])):
        operate(driver, rng)
    log = KVEventLog(driver.kv)
    for _ in range(60):
        for _ in range(rng.randrange(12)):
            operate(driver, rng)
        for change in log.take():
            fleet.changed("a", change.tier, b"".join(change.stored), b"".join(change.removed))
        index = driver.kv._index
        blocks = np.flatnonzero(index.contains(np.arange(len(index._parent_of)))).tolist()
        expected = digest_keys(b"".join(index.digest_of(block) for block in blocks))
        assert set(fleet.index.keys_of("a", TIERS.index("device")).tolist()) == set(expected.tolist())
    assert log.take() == []
