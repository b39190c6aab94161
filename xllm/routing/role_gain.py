"""What a flip of a role spares, adds and costs: seconds beyond the targets, over all requests of a horizon.

Prompts are a queue: its work now, what comes each second, and the instances that compute it. Decoding is shared: what
runs is spread over the instances, and a step is as much longer as there are fewer of them, at most.
"""

from __future__ import annotations

from dataclasses import dataclass

from xllm.routing.role_snapshot import RoleSnapshot, RoleView
from xllm.routing.roles import HANDS_OVER, TAKES_OVER

POINTS = 16  # of the horizon at which lateness is looked at. Chosen: what comes of it is compared, not shown


@dataclass(frozen=True, slots=True)
class RoleLoad:
    """A cluster's load. prefill, decode: those that have the role PREFILL, or DECODE, and are up; num_prefill,
    num_decode: those that compute prompts, or answers, mixed ones among them. queue_s: work that waits, in seconds of
    one instance. first_s: until a usual prompt has been computed at the idlest. prompt_s: what one takes. prefill_rate,
    prompt_rate: as in `RoleState`. step_s: between two tokens, the mean of all sequences. num_running: these. usage: of
    all memory for KV of those that decode, 0 to 1."""

    prefill: tuple[RoleView, ...]
    decode: tuple[RoleView, ...]
    num_prefill: int
    num_decode: int
    queue_s: float
    first_s: float
    prompt_s: float
    prefill_rate: float
    prompt_rate: float
    step_s: float
    num_running: int
    usage: float

    def pressure(self, tpot_s: float, full_at: float) -> float:
        """How much of what they may is asked of those that decode: of the target, or of their memory; 1: all of it."""
        return max(self.step_s / tpot_s, self.usage / full_at)


def load_of(snapshot: RoleSnapshot, prefill_rate: float, prompt_rate: float) -> RoleLoad:
    """Of those that are up."""
    up = [view for view in snapshot.instances if view.is_up]
    first = [view for view in up if view.role in HANDS_OVER]
    then = [view for view in up if view.role in TAKES_OVER]
    num_running = sum(view.num_running for view in then)
    prompt_s = prefill_rate / prompt_rate if prompt_rate > 0.0 else 0.0
    return RoleLoad(
        tuple(view for view in first if view.role == "PREFILL"), tuple(view for view in then if view.role == "DECODE"),
        len(first), len(then), sum(view.queue_s for view in first),
        min((view.queue_s for view in first), default=0.0) + prompt_s, prompt_s, prefill_rate, prompt_rate,
        sum(view.next_token_s * view.num_running for view in then) / max(1, num_running), num_running,
        sum(view.used_tokens for view in then) / max(1, sum(view.num_tokens for view in then)))


def prefill_late_s(load: RoleLoad, num_instances: int, ttft_s: float, horizon_s: float) -> float:
    """Seconds beyond the target that all prompts of the horizon wait in sum, if so many compute them; those that wait
    now and those that come."""
    if num_instances <= 0:
        return float("inf")
    step_s = horizon_s / POINTS
    late_s = (max(0.0, load.queue_s + (load.prefill_rate - num_instances) * (point + 0.5) * step_s) / num_instances
              + load.prompt_s - ttft_s for point in range(POINTS))
    return load.prompt_rate * step_s * sum(max(0.0, late) for late in late_s)


def decode_late_s(load: RoleLoad, num_instances: int, tpot_s: float, full_at: float, horizon_s: float) -> float:
    """Seconds beyond the target that all sequences take longer over the horizon, if so many decode them. Memory that is
    short counts as much as time: what finds no room waits."""
    if num_instances <= 0:
        return float("inf")
    pressure = load.pressure(tpot_s, full_at) * load.num_decode / num_instances
    return load.num_running * horizon_s * max(0.0, pressure - 1.0)


def move_s(snapshot: RoleSnapshot, view: RoleView, to_prefill: bool) -> float:
    """Seconds that the requests of an instance wait while it is drained by migration: sequences for the KV of all of
    them, one after the other; prompts that wait are sent elsewhere."""
    start_s = snapshot.move_start_s
    if not to_prefill:
        return view.num_waiting * start_s
    whole_s = view.num_running * start_s + view.used_tokens * snapshot.kv_token_bytes * snapshot.move_byte_s
    return view.num_running * whole_s / 2.0  # on average half of the others go first
