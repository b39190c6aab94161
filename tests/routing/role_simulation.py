"""A cluster with roles, modelled in ticks: the router and the role control are the product's (`Fleet.decide_pair`,
`plan_roles`), with its predictors; what computes is modelled by a true curve and plane, a link of a true speed."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from xllm.routing.fleet import Fleet
from xllm.routing.global_index import GlobalIndex
from xllm.routing.predictors import DecodePlane, PrefillCurve
from xllm.routing.prompt_marks import NO_MARKS
from xllm.routing.role_plan import plan_roles
from xllm.routing.role_snapshot import Flip, RoleRules, RoleState
from xllm.routing.roles import TAKES_OVER, Role
from xllm.routing.routed_instance import LoadReport

CURVE, PLANE = PrefillCurve(0.02, 1e-4, 5e-9), DecodePlane(0.012, 2e-4, 1e-7)  # as in test_predictors
KV_TOKEN_BYTES, LINK_BYTES_PER_S, MOVE_START_S = 131_072, 5e9, 2e-3  # 8 KV heads of 128, 32 layers, bf16; 40 Gbit/s
NUM_BLOCKS, BLOCK = 8000, 16
TICK_S, BEAT_S, LOOK_S = 0.1, 0.5, 0.2
TTFT_S, TPOT_S = 1.5, 0.05


@dataclass(frozen=True, slots=True)
class Phase:
    """So many requests a second, each with so many prompt tokens and output tokens, for so long."""

    seconds: float
    rate: float
    num_prompt: int
    num_output: int


@dataclass(slots=True)
class Sim:
    """A request. prefill_s: left to compute of its prompt."""

    request_id: str
    num_prompt: int
    num_left: float
    prefill_s: float
    decode: str
    sent_s: float
    first_s: float = 0.0
    done: float = 0.0
    ready_s: float = 0.0  # its KV is there


@dataclass(slots=True)
class Modelled:
    """An instance."""

    waiting: deque[Sim] = field(default_factory=deque)
    running: dict[str, Sim] = field(default_factory=dict)
    steps: list[tuple[float, float, int, int]] = field(default_factory=list)

    @property
    def num_tokens(self) -> float:
        return sum(sim.num_prompt + sim.done for sim in self.running.values())

    def prefill(self, now_s: float) -> list[tuple[Sim, float]]:
        """Those whose prompts were computed in this tick, and when."""
        left_s, begun = TICK_S * (0.7 if self.running else 1.0), []
        while self.waiting and left_s > 0.0:
            spent = min(left_s, self.waiting[0].prefill_s)
            self.waiting[0].prefill_s -= spent
            left_s -= spent
            if self.waiting[0].prefill_s <= 1e-9:
                begun.append((self.waiting.popleft(), now_s + TICK_S - left_s))
        return begun

    def decode(self, now_s: float) -> list[Sim]:
        """Those that have ended in this tick."""
        ready = [sim for sim in self.running.values() if sim.ready_s <= now_s]
        if not ready:
            return []
        step_s = PLANE.seconds(len(ready), sum(sim.num_prompt + sim.done for sim in ready))
        num = TICK_S * (0.3 if self.waiting else 1.0) / step_s
        self.steps.append((now_s, step_s, len(ready), len(ready)))
        for sim in ready:
            sim.done += num
        ended = [sim for sim in ready if sim.done >= sim.num_left]
        for sim in ended:
            del self.running[sim.request_id]
        return ended


@dataclass(slots=True)
class Look:
    """What is to be seen at one time."""

    now_s: float
    num_prefill: int
    num_decode: int
    queue_s: float
    next_token_s: float
    num_running: int


class RoleSimulation:
    """looks: one each second. flips: (when, which). times: (TTFT, TPOT) of each request that ended."""

    def __init__(self, roles: Iterable[Role], rules: RoleRules | None = None, *, seed: int = 0,
                 is_dynamic: bool = True):
        self.fleet = Fleet(index=GlobalIndex(100), target_ttft_s=TTFT_S, target_tpot_s=TPOT_S)
        self.roles: dict[str, Role] = {f"i{number}": role for number, role in enumerate(roles)}
        self.instances = {name: Modelled() for name in self.roles}
        self.looks: list[Look] = []
        self.flips: list[tuple[float, Flip]] = []
        self.times: list[tuple[float, float, float]] = []
        self.reasons = Counter[str]()
        self._rules, self._state, self._is_dynamic = rules or RoleRules(), RoleState(), is_dynamic
        self._turned: dict[str, Role] = {}
        self._rng, self._now_s, self._num = np.random.default_rng(seed), 0.0, 0
        for name, role in self.roles.items():
            self.fleet.join(name, role=role, block_size=BLOCK, max_waiting=10_000, max_open=10_000,
                            num_blocks=NUM_BLOCKS, kv_token_bytes=KV_TOKEN_BYTES)
            self.fleet.profiled(name, [(length, 0, CURVE.seconds(length)) for length in (32, 500, 2000, 8000)],
                                [(num, num * each, PLANE.seconds(num, num * each))
                                 for num in (1, 16, 128) for each in (100, 2000)])
            self.fleet.moved(name, 1e8, MOVE_START_S + 1e8 / LINK_BYTES_PER_S)
            self.fleet.moved(name, 1e6, MOVE_START_S + 1e6 / LINK_BYTES_PER_S)

    def run(self, phase: Phase) -> None:
        end_s = self._now_s + phase.seconds
        while self._now_s < end_s:
            for _ in range(int(self._rng.poisson(phase.rate * TICK_S))):
                self._arrive(phase)
            self._tick()

    def open_ids(self) -> list[str]:
        return [sim.request_id for one in self.instances.values() for sim in (*one.waiting, *one.running.values())]

    def _arrive(self, phase: Phase) -> None:
        num_prompt = max(1, int(phase.num_prompt * self._rng.uniform(0.5, 1.5)))
        self._num += 1
        self._send(Sim(str(self._num), num_prompt, max(2.0, phase.num_output * float(self._rng.uniform(0.5, 1.5))),
                       CURVE.seconds(num_prompt), "", self._now_s))

    def _send(self, sim: Sim, exclude: set[str] | frozenset[str] = frozenset()) -> None:
        pair = self.fleet.decide_pair([NO_MARKS], sim.num_prompt, 1, self._now_s, exclude=exclude)
        assert pair.first is not None and pair.decode is not None
        self.reasons[pair.reason] += 1
        sim.decode = pair.decode
        self.fleet.sent(pair.first, sim.request_id, sim.num_prompt, NO_MARKS)
        if pair.prefill is not None:
            self.fleet.expect(pair.decode, sim.request_id, sim.num_prompt)
        self.instances[pair.first].waiting.append(sim)

    def _tick(self) -> None:
        now_s = self._now_s
        for name, one in self.instances.items():
            for sim, at_s in one.prefill(now_s):
                self._begun(name, sim, at_s)
            for sim in one.decode(now_s):
                self.fleet.left(name, sim.request_id)
                self.times.append((sim.sent_s, sim.first_s - sim.sent_s,
                                   (now_s + TICK_S - sim.first_s) / sim.num_left))
        number = round(now_s / TICK_S)
        if number % round(BEAT_S / TICK_S) == 0:
            self._beat()
        if self._is_dynamic and number % round(LOOK_S / TICK_S) == 0:
            self._look()
        if number % round(1.0 / TICK_S) == 0:
            self._note()
        self._now_s = (number + 1) * TICK_S

    def _begun(self, name: str, sim: Sim, at_s: float) -> None:
        self.fleet.begun(name, sim.request_id, at_s)
        sim.first_s = at_s
        if sim.decode != name:
            self.fleet.left(name, sim.request_id)
            self.fleet.sent(sim.decode, sim.request_id, 0, NO_MARKS)
            self.fleet.begun(sim.decode, sim.request_id)
        self._land(sim, at_s)

    def _land(self, sim: Sim, at_s: float) -> None:
        sim.ready_s = at_s + MOVE_START_S + sim.num_prompt * KV_TOKEN_BYTES / LINK_BYTES_PER_S
        self.instances[sim.decode].running[sim.request_id] = sim

    def _beat(self) -> None:
        for name, one in self.instances.items():
            num_free = max(0, NUM_BLOCKS - int(one.num_tokens) // BLOCK)
            self.fleet.heard(name, LoadReport(num_waiting=len(one.waiting), num_running=len(one.running),
                                              num_free_blocks=num_free, steps=one.steps), self._now_s)
            one.steps = []

    def _look(self) -> None:
        for name in [name for name, old in self._turned.items() if self._is_drained(name, old)]:
            del self._turned[name]
        plan = plan_roles(self.fleet.roles(self._now_s, self._turned), self._state, self._rules)
        self._state = plan.state
        for flip in plan.flips:
            self.flips.append((self._now_s, flip))
            self._turn(flip)

    def _is_drained(self, name: str, old: Role) -> bool:
        one = self.instances[name]
        return not one.waiting if old == "PREFILL" else not one.running

    def _turn(self, flip: Flip) -> None:
        one, old = self.instances[flip.name], self.roles[flip.name]
        self._turned.pop(flip.name, None) if flip.name in self._turned else self._turned.update({flip.name: old})
        self.roles[flip.name] = flip.role
        self.fleet.turn(flip.name, flip.role)
        if old == "PREFILL":
            for sim in [sim for sim in one.waiting if sim.prefill_s == CURVE.seconds(sim.num_prompt)]:
                one.waiting.remove(sim)
                for place in {flip.name, sim.decode}:
                    self.fleet.left(place, sim.request_id)
                self._send(sim, {flip.name})
            return
        free_s = self._now_s
        for sim in list(one.running.values()):
            others = [name for name, role in self.roles.items() if role in TAKES_OVER and name != flip.name]
            del one.running[sim.request_id]
            sim.decode = min(others, key=lambda name: len(self.instances[name].running))
            self.fleet.left(flip.name, sim.request_id)
            self.fleet.sent(sim.decode, sim.request_id, 0, NO_MARKS)
            self.fleet.begun(sim.decode, sim.request_id)
            self._land(sim, free_s)
            free_s = sim.ready_s

    def _note(self) -> None:
        views = self.fleet.roles(self._now_s, self._turned).instances
        first = [view for view in views if view.role == "PREFILL"]
        then = [view for view in views if view.role == "DECODE"]
        num_running = sum(view.num_running for view in then)
        self.looks.append(Look(self._now_s, len(first), len(then), min((view.queue_s for view in first), default=0.0),
                               sum(view.next_token_s * view.num_running for view in then) / max(1, num_running),
                               num_running))


def kept(times: Iterable[tuple[float, float, float]], since_s: float = 0.0) -> float:
    """The share of requests sent since then that kept both targets."""
    judged = [ttft_s <= TTFT_S and tpot_s <= TPOT_S for sent_s, ttft_s, tpot_s in times if sent_s >= since_s]
    return sum(judged) / max(1, len(judged))
