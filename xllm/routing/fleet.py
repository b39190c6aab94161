"""`Fleet`: what the router of a cluster knows of all instances, and where a call goes. Without I/O and without a clock:
whoever has the connections tells it what they say, and the time.

An instance joins, says what it has cached and how it is, and leaves. A request is `sent` as soon as it is, so that the
next decision counts it; it has `begun` with its first output, and has `left` when it ends, however.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from xllm.kv.block import TIERS
from xllm.routing.fleet_snapshot import Decision, FleetSnapshot, RoutedCall
from xllm.routing.global_index import GlobalIndex, Matches, TierChange, digest_keys
from xllm.routing.pace import PREFILL_TOKENS_PER_S, STEP_S
from xllm.routing.pair_costs import PairCall, filled, pair_snapshot, prompt_curve, role_snapshot
from xllm.routing.pair_snapshot import PairDecision
from xllm.routing.pairs import choose_pair
from xllm.routing.policies import policy_of
from xllm.routing.prompt_marks import PromptMarks
from xllm.routing.role_snapshot import RoleSnapshot
from xllm.routing.roles import ROLES, Role
from xllm.routing.routed_instance import STALE_S, Capacity, Figures, FigureTable, LoadReport, RoutedInstance, faded

# What a block costs to be brought to the device from each tier over what it costs to be computed. Measured with the
# bundled model on a CPU (benchmarks/results/tiers.json, times to the first token of a known text over an unknown one).
LOAD_COSTS = (0.0, 0.08, 0.14)
# Defaults of xllm-service's targets.
TARGET_TTFT_S, TARGET_TPOT_S = 1.0, 0.05
# Sessions of which the last instance is known. Chosen: 1 MB or so; it decides among equals only.
MAX_SESSIONS = 10_000


class Fleet:
    """policy: of `policies.POLICIES`. index: of all instances' blocks. seed: of the numbers that are drawn.
    target_ttft_s, target_tpot_s: what `slo_aware` keeps where it can. Not thread-safe.

    Names that are not known are ignored where something is told of an instance: it may have left. Raises ValueError for
    an unknown policy.
    """

    def __init__(self, policy: str = "cache_aware", *, index: GlobalIndex | None = None, seed: int = 0,
                 target_ttft_s: float = TARGET_TTFT_S, target_tpot_s: float = TARGET_TPOT_S):
        self._decide = policy_of(policy)
        self.index = GlobalIndex() if index is None else index
        self._targets = target_ttft_s, target_tpot_s
        self._random = random.Random(seed)
        self._instances: dict[str, RoutedInstance] = {}
        self._figures = FigureTable()
        self._block_size: int | None = None
        self._num_joined = self._turn = self._prefill_turn = 0
        self._now_s = 0.0
        self._num_prompts, self._prefill_s = 0, 0.0  # that were sent so far, and what they take
        self._sessions: OrderedDict[str, str] = OrderedDict()

    # --- instances

    @property
    def names(self) -> tuple[str, ...]:
        """Of the instances, as they joined."""
        return tuple(self._instances)

    @property
    def block_size(self) -> int | None:
        """The block size that most instances have (of equally many the first): prompts are to be marked with it.
        Nothing is found at the others. None: there is no instance."""
        return self._block_size

    @property
    def has_pairs(self) -> bool:
        """Whether some instance has a role other than DEFAULT: calls are to be decided on by `decide_pair`."""
        return any(instance.role != "DEFAULT" for instance in self._instances.values())

    def join(self, name: str, *, role: str = "DEFAULT", block_size: int, max_waiting: int, max_open: int,
             num_blocks: int, kv_token_bytes: int = 0) -> None:
        """An instance, or another life of one, takes requests; nothing is cached there. The rest as in `Capacity`.
        Raises ValueError if there are as many as the index has room for, or for a role other than `ROLES`."""
        known = _role_of(name, role)
        self.index.forget(name)
        self._instances.pop(name, None)
        self._num_joined += 1
        self._instances[name] = RoutedInstance(self._num_joined, Capacity(
            block_size=block_size, max_waiting=max_waiting, max_open=max_open, num_blocks=num_blocks,
            kv_token_bytes=kv_token_bytes), known)
        self._note_block_size()

    def turn(self, name: str, role: str) -> None:
        """An instance has this role from now on, for new work. Raises ValueError for a role that does not exist."""
        known = _role_of(name, role)
        if name in self._instances:
            self._instances[name].role = known

    def profiled(self, name: str, prompts: Iterable[tuple[float, float, float]],
                 steps: Iterable[tuple[float, float, float]]) -> None:
        """What an instance measured when it started: prompts as in `PrefillFit.start`, steps as in `DecodeFit.start`.
        At least one of each."""
        if name in self._instances:
            self._instances[name].profiled(prompts, steps)

    def leave(self, name: str) -> None:
        """An instance has gone, and its requests with it."""
        self.index.leave(name)
        self._instances.pop(name, None)
        self._note_block_size()

    def _note_block_size(self) -> None:
        sizes = [instance.capacity.block_size for instance in self._instances.values()]
        self._block_size = max(sizes, key=sizes.count, default=None)

    def changed(self, name: str, tier: int, stored: bytes, removed: bytes) -> None:
        """What an instance has cached has changed: see `engine/commands.py:CacheChanges`."""
        if name in self._instances:
            self.index.change(name, [TierChange(tier, digest_keys(stored), digest_keys(removed))])

    def behind(self, name: str, is_behind: bool) -> None:
        """Whether it is known that changes of its cache are missing."""
        if name in self._instances:
            self._instances[name].fall_behind(is_behind)

    def heard(self, name: str, report: LoadReport, now_s: float) -> None:
        """An instance has said how it is."""
        self._now_s = max(self._now_s, now_s)
        if name in self._instances:
            self._instances[name].hear(report, now_s)

    # --- requests

    def sent(self, name: str, request_id: str, to_compute: int, marks: PromptMarks) -> None:
        """A request was sent there, of whose prompt so many tokens are to be computed. marks: `NO_MARKS` if the call
        has another one with the same prompt."""
        if (instance := self._instances.get(name)) is None:
            return
        if instance.enter(request_id, to_compute, marks, self._now_s):
            num_cached = max(0, (marks.num_tokens or [0])[-1] - to_compute)
            self._num_prompts += 1
            self._prefill_s += prompt_curve(instance.figures).seconds(to_compute, num_cached)

    def expect(self, name: str, request_id: str, num_tokens: int) -> None:
        """A request that was sent elsewhere will go on there, with the KV of so many tokens: counted there as of now.
        It ends with `sent` or `left`."""
        if (instance := self._instances.get(name)) is not None:
            instance.expect(request_id, num_tokens)

    def moved(self, name: str, num_bytes: float, seconds: float) -> None:
        """KV has come there from another instance."""
        if (instance := self._instances.get(name)) is not None:
            instance.moved(num_bytes, seconds)

    def begun(self, name: str, request_id: str, now_s: float | None = None) -> None:
        """Its first output has come. Ids that are not known, or have begun, are ignored. now_s: on the clock of
        `heard`; None: nothing is learnt of how long a prompt takes there."""
        if (instance := self._instances.get(name)) is not None:
            instance.begun(request_id, now_s)

    def left(self, name: str, request_id: str) -> None:
        """It has ended, however. Ids that are not known are ignored."""
        if (instance := self._instances.get(name)) is not None:
            instance.left(request_id)

    # --- decisions

    def decide(self, prompts: Sequence[PromptMarks], num_tokens: int, num_requests: int, now_s: float, *,
               session: str | None = None, exclude: Collection[str] = (),
               deadline_s: float | None = None) -> Decision:
        """Where a call goes: all of its requests go to one instance. It is not counted before it is `sent`.

        prompts: those that differ, marked in blocks of `block_size`. num_tokens: of all of them. now_s: on the clock of
        `heard`. session: of which the call is a turn. exclude: names that it must not go to; Decision.name is None if
        no other is left. deadline_s: on the same clock; `slo_aware` wants the first token before it.
        """
        self._now_s = max(self._now_s, now_s)
        names = tuple(name for name in self._instances if name not in exclude) if exclude else self.names
        if not names:
            return Decision(None, "nobody")
        matches = [self._matched(marks) for marks in prompts]
        snapshot = self._snapshot(names, matches, num_requests, self._figures_of(names))
        decision = self._decide(snapshot, self._call(names, num_tokens, session, deadline_s))
        assert decision.name is not None
        self._remember(decision.name, session)
        return Decision(decision.name, decision.reason, decision.scores, _matched_at(decision.name, matches))

    def decide_pair(self, prompts: Sequence[PromptMarks], num_tokens: int, num_requests: int, now_s: float, *,
                    session: str | None = None, exclude: Collection[str] = (),
                    deadline_s: float | None = None) -> PairDecision:
        """Who computes a call's prompts, and who goes on: as `decide`, which decides where all instances are DEFAULT;
        else `choose_pair` does. PairDecision.decode is None if nobody is left. It is to be `sent` to `first`, and, if
        another goes on, is to `expect` there."""
        if not self.has_pairs:
            one = self.decide(prompts, num_tokens, num_requests, now_s, session=session, exclude=exclude,
                              deadline_s=deadline_s)
            return PairDecision(None, one.name, one.reason, one.scores, one.matched_tokens, one.matched_tokens)
        self._now_s = max(self._now_s, now_s)
        names = tuple(name for name in self._instances if name not in exclude)
        if not names:
            return PairDecision(None, None, "nobody")
        matches = [self._matched(marks) for marks in prompts]
        figures = self._figures_of(names)
        snapshot = self._snapshot(names, matches, num_requests, figures)
        matched = np.zeros(len(names), dtype=np.int64)
        for found in matches:
            matched += _in_order(found, names).blocks_TI[-1]
        decision = choose_pair(
            pair_snapshot(snapshot, figures, tuple(self._instances[name].role for name in names), matched,
                          PairCall(len(prompts), num_tokens, num_requests), self._place_of(names, self._prefill_turn)),
            self._call(names, num_tokens, session, deadline_s))
        assert decision.decode is not None and decision.first is not None
        self._remember(decision.decode, session)
        if decision.prefill is not None:
            self._prefill_turn = self._instances[decision.prefill].number + 1
        return replace(decision, matched_tokens=_matched_at(decision.first, matches),
                       decode_tokens=_matched_at(decision.decode, matches))

    def roles(self, now_s: float, turned_from: Mapping[str, Role], fixed: Collection[str] = ()) -> RoleSnapshot:
        """What `plan_roles` decides about. turned_from: the old roles of instances that are still being drained.
        fixed: names of those whose roles stay."""
        self._now_s = max(self._now_s, now_s)
        ttft_s, tpot_s = self._targets
        return role_snapshot(self.names, tuple(instance.role for instance in self._instances.values()),
                             self._figures_of(self.names), turned_from, fixed, now_s=self._now_s, ttft_s=ttft_s,
                             tpot_s=tpot_s, num_prompts=self._num_prompts, prefill_s=self._prefill_s)

    def _remember(self, name: str, session: str | None) -> None:
        self._turn = self._instances[name].number + 1
        if session is not None:
            self._sessions[session] = name
            self._sessions.move_to_end(session)
            if len(self._sessions) > MAX_SESSIONS:
                self._sessions.popitem(last=False)

    def _place_of(self, names: Sequence[str], turn: int) -> int:
        return next((place for place, name in enumerate(names) if self._instances[name].number >= turn), 0)

    def _call(self, names: Sequence[str], num_tokens: int, session: str | None, deadline_s: float | None) -> RoutedCall:
        ttft_s, tpot_s = self._targets
        if deadline_s is not None:
            ttft_s = min(ttft_s, deadline_s - self._now_s)
        last = None if session is None else self._sessions.get(session)
        return RoutedCall(num_tokens=num_tokens, last=last, turn=self._place_of(names, self._turn), ttft_s=ttft_s,
                          tpot_s=tpot_s, draws=(self._random.random(), self._random.random()))

    def _matched(self, marks: PromptMarks) -> Matches:
        """The same as the index says, in tokens; what is promised counts as on the device."""
        found = self.index.match(digest_keys(b"".join(marks.digests)))
        promised = [self._instances[name].sent.num_promised(marks) for name in found.names]
        num_marks = np.maximum(found.blocks_TI, np.array(promised, dtype=np.int64))
        return Matches(found.names, np.array([0, *marks.num_tokens], dtype=np.int64)[num_marks])

    def _figures_of(self, names: tuple[str, ...]) -> Figures:
        return self._figures.of([self._instances[name] for name in names])

    def _snapshot(self, names: tuple[str, ...], matches: Sequence[Matches], num_requests: int,
                  now: Figures) -> FleetSnapshot:
        saved, on_device = np.zeros(len(names)), np.zeros(len(names), dtype=np.int64)
        for found in matches:
            found = _in_order(found, names)
            saved += found.saved(LOAD_COSTS)
            on_device += found.blocks_TI[0]
        return FleetSnapshot(
            names=names, saved_tokens=saved, device_tokens=on_device, waiting_tokens=now.waiting_tokens,
            num_open=now.num_open, num_queued=now.num_queued, num_tokens=now.num_tokens, free_tokens=now.free_tokens,
            spent_tokens=faded(now.spent_tokens, self._now_s - now.spent_s),
            is_full=(now.num_queued + num_requests > now.max_waiting) | (now.num_open + num_requests > now.max_open),
            is_stale=(now.is_behind > 0) | (self._now_s - now.heard_s > STALE_S),
            prefill_tokens_per_s=filled(1.0 / now.token_s, PREFILL_TOKENS_PER_S),
            next_token_s=filled(now.step_s + now.sequence_s * (now.num_running + num_requests), STEP_S))


def _role_of(name: str, role: str) -> Role:
    for known in ROLES:
        if known == role:
            return known
    raise ValueError(f"{name}: there is no role {role!r}; roles are {', '.join(ROLES)}")


def _in_order(found: Matches, names: tuple[str, ...]) -> Matches:
    """The same of these instances only, in this order."""
    if found.names == names:
        return found
    place_of = {name: place for place, name in enumerate(found.names)}
    return Matches(names, found.blocks_TI[:, [place_of[name] for name in names]])


def _matched_at(name: str, matches: Sequence[Matches]) -> tuple[int, ...]:
    """Tokens of each prompt that are found at an instance."""
    return tuple(int(found.blocks_TI[-1, found.names.index(name)]) for found in matches)


assert len(LOAD_COSTS) == len(TIERS)
