"""`plan_roles`: which instances become prefill or decode instances now. Pure: the same snapshot, state and rules give
the same plan, so that a simulator runs what a cluster runs.

The rules are those of the xLLM report (section 3.2) and of xllm-service: an instance is turned to prefill when prompts
wait too long, the least-loaded one, first one that is still being turned the other way; it is turned to decode when
tokens come too slowly, memory is short, or it is idle; two decode instances stay. What they lack is added here: a state
is entered and left at different thresholds and must last (hysteresis), an instance keeps a role for a while (dwell),
few are turned at once, and a flip must spare more time beyond the targets than it adds on the other side and costs
itself (`role_gain.py`). Nothing here is counted from events: a snapshot says what is, so nothing can drift.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from xllm.routing.role_gain import RoleLoad, decode_late_s, load_of, move_s, prefill_late_s
from xllm.routing.role_snapshot import Flip, FlipReason, RolePlan, RoleRules, RoleSnapshot, RoleState, RoleView
from xllm.routing.roles import Role

DEFAULT_RULES = RoleRules()


def plan_roles(snapshot: RoleSnapshot, state: RoleState, rules: RoleRules = DEFAULT_RULES) -> RolePlan:
    """Which roles change now: one flip at most a look. A snapshot that is older than the last one changes nothing; nor
    does the same one again, once its flips were begun. Whoever carries a flip out gives the instance its new role in
    the next snapshot, and the old one as `turned_from` until it is drained."""
    if state.now_s is not None and snapshot.now_s < state.now_s:
        return RolePlan((), state)
    state = _looked(snapshot, state, rules)
    load = load_of(snapshot, state.prefill_rate, state.prompt_rate)
    state = replace(state, since=_states(snapshot, load, state, rules))
    flip = _restoring(snapshot, load, state, rules) or _improving(snapshot, load, state, rules)
    if flip is None:
        return RolePlan((), state)
    is_back = any(view.name == flip.name and view.turned_from is not None for view in snapshot.instances)
    return RolePlan((flip,), replace(
        state, flipped_s={**state.flipped_s, flip.name: snapshot.now_s}, since={},
        turned_back=state.turned_back | {flip.name} if is_back else state.turned_back - {flip.name}))


# --- what is remembered


def _looked(snapshot: RoleSnapshot, state: RoleState, rules: RoleRules) -> RoleState:
    """With the rates of late, and without instances that are gone."""
    names = {view.name for view in snapshot.instances}
    flipped_s = {name: at_s for name, at_s in state.flipped_s.items() if name in names}
    kept = replace(state, now_s=snapshot.now_s, flipped_s=flipped_s, turned_back=state.turned_back & names,
                   num_prompts=snapshot.num_prompts, prefill_s=snapshot.prefill_s)
    if state.now_s is None or (past_s := snapshot.now_s - state.now_s) <= 0.0:
        return kept
    share = 1.0 - math.exp(-past_s / rules.rate_s)
    come = max(0, snapshot.num_prompts - state.num_prompts) / past_s
    work = max(0.0, snapshot.prefill_s - state.prefill_s) / past_s
    return replace(kept, prefill_rate=state.prefill_rate + share * (work - state.prefill_rate),
                   prompt_rate=state.prompt_rate + share * (come - state.prompt_rate))


def _states(snapshot: RoleSnapshot, load: RoleLoad, state: RoleState, rules: RoleRules) -> dict[str, float]:
    """Since when each state has lasted: entered at one threshold, left below another."""
    left = (load.num_prefill - 1) * rules.idle_load
    is_idle = any(not view.queue_s and not view.num_waiting for view in load.prefill) and load.prefill_rate <= left
    levels = {"late": (load.first_s / snapshot.ttft_s, rules.late_at, rules.late_until),
              "slow": (load.step_s / snapshot.tpot_s, rules.slow_at, rules.slow_until),
              "full": (load.usage, rules.full_at, rules.full_until),
              "idle": (float(is_idle and load.pressure(snapshot.tpot_s, rules.full_at) >= rules.idle_pressure),
                       1.0, 1.0)}
    return {name: state.since.get(name, snapshot.now_s) for name, (level, enter, leave) in levels.items()
            if level >= (leave if name in state.since else enter)}


# --- rules


def _restoring(snapshot: RoleSnapshot, load: RoleLoad, state: RoleState, rules: RoleRules) -> Flip | None:
    """There are fewer of a kind than there must be, because some are gone: at once, if the others can spare one."""
    if load.num_prefill < rules.min_prefill and load.num_decode > rules.min_decode:
        return _flip(snapshot, load, state, rules, "PREFILL", "no_prefill")
    if load.num_decode < rules.min_decode and load.num_prefill > rules.min_prefill:
        return _flip(snapshot, load, state, rules, "DECODE", "few_decode")
    return None


def _improving(snapshot: RoleSnapshot, load: RoleLoad, state: RoleState, rules: RoleRules) -> Flip | None:
    """The first of the rules that holds, for long enough, and pays."""
    def lasts(name: str, least_s: float) -> bool:
        return name in state.since and snapshot.now_s - state.since[name] >= least_s

    last_s = max(state.flipped_s.values(), default=-math.inf)
    if snapshot.now_s - last_s < rules.hold_s:
        return None
    candidates: tuple[tuple[str, float, Role, FlipReason], ...] = (
        ("late", rules.hold_s, "PREFILL", "ttft"), ("slow", rules.hold_s, "DECODE", "tpot"),
        ("full", rules.hold_s, "DECODE", "memory"), ("idle", rules.idle_s, "DECODE", "idle"))
    for name, least_s, role, reason in candidates:
        flip = _flip(snapshot, load, state, rules, role, reason) if lasts(name, least_s) else None
        if flip is not None and (reason == "idle" or flip.gain_s > rules.margin * (flip.loss_s + flip.cost_s)):
            return flip
    return None


def _flip(snapshot: RoleSnapshot, load: RoleLoad, state: RoleState, rules: RoleRules, role: Role,
          reason: FlipReason) -> Flip | None:
    """The flip of the least-loaded instance that may get this role; None: none may, or too few would be left."""
    to_prefill = role == "PREFILL"
    is_needed = reason not in ("few_decode", "idle") and load.prefill_rate > rules.stable_load * (load.num_prefill - 1)
    if not to_prefill and is_needed:
        return None
    source, spare = (load.decode, load.num_decode - rules.min_decode) if to_prefill else (
        load.prefill, load.num_prefill - rules.min_prefill)
    able = [view for view in source if spare > 0 and _may_flip(snapshot, state, rules, view)
            and (reason != "idle" or not (view.queue_s or view.num_waiting))]
    if not able:
        return None
    key: Callable[[RoleView], tuple[float, ...]] = _decode_load if to_prefill else _prefill_load
    chosen = min(able, key=lambda view: (view.turned_from is None, *key(view), view.name))
    change = 1 if to_prefill else -1
    horizon_s, ttft_s = rules.horizon_s, snapshot.ttft_s
    first = [prefill_late_s(load, num, ttft_s, horizon_s) for num in (load.num_prefill, load.num_prefill + change)]
    then = [decode_late_s(load, num, snapshot.tpot_s, rules.full_at, horizon_s)
            for num in (load.num_decode, load.num_decode - change)]
    spared, added = (first[0] - first[1], then[1] - then[0]) if to_prefill else (then[0] - then[1], first[1] - first[0])
    return Flip(chosen.name, role, reason, spared, max(0.0, added), move_s(snapshot, chosen, to_prefill))


def _may_flip(snapshot: RoleSnapshot, state: RoleState, rules: RoleRules, view: RoleView) -> bool:
    """Whether an instance has kept its role for long enough. One that is being turned may be turned back, once."""
    past_s = snapshot.now_s - state.flipped_s.get(view.name, -math.inf)
    if not view.is_flexible:
        return False
    if view.turned_from is not None and view.name not in state.turned_back and past_s < rules.give_up_s:
        return True
    if past_s < rules.dwell_s:
        return False
    num_turned = sum(other.turned_from is not None for other in snapshot.instances
                     if snapshot.now_s - state.flipped_s.get(other.name, -math.inf) < rules.give_up_s)
    return num_turned < max(1, sum(other.is_up for other in snapshot.instances) // rules.instances_a_flip)


def _decode_load(view: RoleView) -> tuple[float, ...]:
    return view.used_tokens, view.num_running


def _prefill_load(view: RoleView) -> tuple[float, ...]:
    return view.queue_s, view.num_waiting
