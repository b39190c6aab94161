"""The fleet against a slow model of dictionaries and plain sums, through random lives of instances and requests."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field

import pytest

from xllm.kv.block import TIERS
from xllm.routing.fleet import LOAD_COSTS, Fleet
from xllm.routing.fleet_snapshot import Decision
from xllm.routing.global_index import GlobalIndex
from xllm.routing.policies import POLICIES
from xllm.routing.prompt_marks import NO_MARKS, PromptMarks
from xllm.routing.routed_instance import SPENT_HALF_S, STALE_S, LoadReport

NAMES = "abcdef"
BLOCK, MAX_WAITING, MAX_OPEN, NUM_BLOCKS = 100, 12, 25, 300


@dataclass
class SlowInstance:
    number: int
    cached: list[set[bytes]] = field(default_factory=lambda: [set() for _ in TIERS])
    open: dict[str, tuple[int, list[bytes], bool]] = field(default_factory=dict)  # tokens, digests, whether it waits
    work: list[tuple[float, int]] = field(default_factory=list)  # when, tokens
    reports: list[tuple[float, int, int, int, int]] = field(default_factory=list)  # the last: its members; sent then
    is_behind: bool = False

    @property
    def waiting(self) -> list[tuple[int, list[bytes], bool]]:
        return [one for one in self.open.values() if one[2]]

    @property
    def waiting_tokens(self) -> int:
        return sum(num_tokens for num_tokens, _, _ in self.waiting)

    @property
    def num_open(self) -> int:
        excess = [max(0, waiting + running - sent) for _, waiting, running, _, sent in self.reports[-2:]]
        return len(self.open) + (min(excess) if len(excess) == 2 else 0)

    @property
    def num_queued(self) -> int:
        return max(len(self.waiting), self.reports[-1][1] if self.reports else 0)

    @property
    def free_tokens(self) -> int:
        free = self.reports[-1][3] if self.reports else NUM_BLOCKS
        return max(0, free * BLOCK - self.waiting_tokens)

    def spent(self, now_s: float) -> float:
        return sum(num_tokens * 0.5 ** ((now_s - at_s) / SPENT_HALF_S) for at_s, num_tokens in self.work)

    def matched(self, marks: PromptMarks) -> list[int]:
        """Tokens in the tiers up to each one."""
        promised = {digest for _, digests, _ in self.waiting for digest in digests}
        found = []
        for tier in range(len(TIERS)):
            reachable = set[bytes]().union(*self.cached[: tier + 1])
            runs = [next((place for place, digest in enumerate(marks.digests) if digest not in known),
                         len(marks.digests)) for known in (reachable, promised)]
            found.append([0, *marks.num_tokens][max(runs)])
        return found


class SlowFleet:
    def __init__(self) -> None:
        self.instances: dict[str, SlowInstance] = {}
        self.num_joined = self.turn = 0

    def check(self, fleet: Fleet, policy: str, marks: PromptMarks, num_tokens: int, exclude: set[str], now_s: float,
              decision: Decision) -> None:
        names = [name for name in self.instances if name not in exclude]
        if not names:
            assert decision == Decision(None, "nobody")
            return
        assert decision.name in names and list(decision.scores) == names
        matched = {name: self.instances[name].matched(marks) for name in names}
        assert decision.matched_tokens == (matched[decision.name][-1],)
        saved = {name: one[0] + (one[1] - one[0]) * (1 - LOAD_COSTS[1]) + (one[2] - one[1]) * (1 - LOAD_COSTS[2])
                 for name, one in matched.items()}
        mean = sum(self.instances[name].spent(now_s) for name in names) / len(names)
        ranks = {}
        for name in names:
            one = self.instances[name]
            full = one.num_queued + 1 > MAX_WAITING or one.num_open + 1 > MAX_OPEN
            stale = not full and (one.is_behind or bool(one.reports and now_s - one.reports[-1][0] > STALE_S))
            short = not full and not stale and num_tokens - matched[name][0] > one.free_tokens
            if policy == "cache_aware":
                cost = (1.25 * (num_tokens - saved[name]) + one.waiting_tokens + 64 * one.num_open
                        + 0.2 * max(0.0, one.spent(now_s) - 1.1 * mean))
            elif policy == "load_aware":
                need = num_tokens - matched[name][0]
                cost = 1 - (one.free_tokens - need) / (NUM_BLOCKS * BLOCK) + one.num_queued / 256
            else:
                cost = decision.scores[name]
            assert decision.scores[name] == pytest.approx(cost), f"{policy}: {name}"
            ranks[name] = (full, stale, short, cost)
        chosen, best = ranks[decision.name], min(ranks.values())
        if policy == "round_robin":
            order = sorted(names, key=lambda name: (self.instances[name].number < self.turn,
                                                    self.instances[name].number))
            assert decision.name == next((name for name in order if not ranks[name][0]), order[0])
        elif policy == "random":
            assert (decision.reason == "full") == chosen[0] == best[0]
        else:
            # Of those that are all full nothing else counts but cost; of those that are all stale, what is drawn.
            assert chosen[:3] == best[:3]
            assert (decision.reason in ("full", "stale", "no_memory")) == any(best[:3])
            if policy != "slo_aware" and not best[1]:
                assert chosen[3] == pytest.approx(best[3])
        self.turn = self.instances[decision.name].number + 1


def live(seed: int, policy: str, num_operations: int) -> None:
    rng = random.Random(seed)
    fleet, slow, now_s, serial = Fleet(policy, index=GlobalIndex(3000), seed=seed), SlowFleet(), 0.0, 0
    texts = [[rng.randbytes(16) for _ in range(30)] for _ in range(12)]
    texts += [rng.choice(texts)[: rng.randrange(30)] + [rng.randbytes(16) for _ in range(15)] for _ in range(12)]

    def some_marks() -> PromptMarks:
        text = rng.choice(texts)[: rng.randrange(45)]
        return PromptMarks(text, [BLOCK * (place + 1) for place in range(len(text))])

    for _ in range(num_operations):
        now_s += rng.expovariate(5.0)
        kind, name = rng.random(), rng.choice(NAMES)
        one = slow.instances.get(name)
        if kind < 0.01 or len(slow.instances) < 2:
            fleet.join(name, block_size=BLOCK, max_waiting=MAX_WAITING, max_open=MAX_OPEN, num_blocks=NUM_BLOCKS)
            slow.instances.pop(name, None)
            slow.num_joined += 1
            slow.instances[name] = SlowInstance(slow.num_joined)
        elif kind < 0.015:
            fleet.leave(name)
            slow.instances.pop(name, None)
        elif kind < 0.03:
            is_behind = rng.random() < 0.3
            fleet.behind(name, is_behind)
            if one is not None:
                one.is_behind = is_behind
        elif kind < 0.15:
            report = LoadReport(num_waiting=rng.choice([0, 0, 1, 5, 12]), num_running=rng.choice([0, 2, 9, 20]),
                                num_free_blocks=rng.choice([0, 20, 100, 300]))
            fleet.heard(name, report, now_s)
            if one is not None:
                one.reports.append((now_s, report.num_waiting, report.num_running, report.num_free_blocks,
                                    len(one.open)))
        elif kind < 0.4:
            text, tier = rng.choice(texts), rng.randrange(len(TIERS))
            first, last = sorted(rng.choices(range(len(text) + 1), k=2))
            stored, removed = (text[first:last], []) if rng.random() < 0.6 else ([], text[first:last])
            fleet.changed(name, tier, b"".join(stored), b"".join(removed))
            if one is not None:
                one.cached[tier] -= set(removed)
                one.cached[tier] |= set(stored)
        elif kind < 0.6:
            if one is None or not one.open:
                continue
            request_id = rng.choice([*one.open, "nobody's"])
            num_tokens, digests, _ = one.open.get(request_id, (0, [], False))
            if rng.random() < 0.5:
                fleet.begun(name, request_id)
                if request_id in one.open:
                    one.open[request_id] = num_tokens, digests, False
            else:
                fleet.left(name, request_id)
                one.open.pop(request_id, None)
        else:
            marks = some_marks()
            num_tokens = marks.num_tokens[-1] + rng.randrange(BLOCK) if marks.num_tokens else rng.randrange(1, BLOCK)
            exclude = {name for name in NAMES if rng.random() < 0.1}
            decision = fleet.decide([marks], num_tokens, 1, now_s, session=rng.choice([None, "1", "2"]),
                                    exclude=exclude)
            slow.check(fleet, policy, marks, num_tokens, exclude, now_s, decision)
            if decision.name is None or rng.random() < 0.3:
                continue
            serial += 1
            to_compute = num_tokens - decision.matched_tokens[0]
            own = marks if rng.random() < 0.9 else NO_MARKS
            fleet.sent(decision.name, str(serial), to_compute, own)
            there = slow.instances[decision.name]
            there.open[str(serial)] = to_compute, own.digests, True
            there.work.append((now_s, to_compute))
    assert fleet.names == tuple(slow.instances)


@pytest.mark.parametrize("policy", POLICIES)
def test_it_decides_as_a_slow_model(policy: str) -> None:
    for seed in range(5 if os.environ.get("INDEX_ALL") else 1):
        live(seed, policy, 5000 if os.environ.get("INDEX_ALL") else 600)
