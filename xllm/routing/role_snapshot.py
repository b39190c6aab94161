"""`RoleSnapshot`: a cluster as whoever gives its instances their roles sees it; `RoleState`: what is remembered between
two looks; `RolePlan`: which roles change now.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from xllm.routing.roles import Role

# no_prefill: there are fewer prefill instances than there must be; few_decode: fewer decode instances. ttft: prompts
# wait too long. tpot: decoding is too slow. memory: it has too little room. idle: a prefill instance has nothing to do.
FlipReason = Literal["no_prefill", "few_decode", "ttft", "tpot", "memory", "idle"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleView:
    """An instance. role: for new work. turned_from: the role whose work is still being drained from it; None: it is not
    being turned. is_flexible: its role may be changed. is_up: it takes work. queue_s: until the prompts that wait there
    are computed; num_waiting: of them. num_running: sequences that it decodes, of used_tokens, where there is room for
    num_tokens. next_token_s: between two tokens of each."""

    name: str
    role: Role
    turned_from: Role | None = None
    is_flexible: bool = True
    is_up: bool = True
    queue_s: float = 0.0
    num_waiting: int = 0
    num_running: int = 0
    used_tokens: int = 0
    num_tokens: int = 1
    next_token_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleSnapshot:
    """now_s: on a clock that does not go backwards. ttft_s, tpot_s: targets. num_prompts: that have come so far, and
    prefill_s: what these take to compute, in seconds of one instance; both only grow. move_start_s, move_byte_s: what
    it takes to move KV to another instance, of kv_token_bytes a token."""

    now_s: float
    instances: tuple[RoleView, ...]
    ttft_s: float
    tpot_s: float
    num_prompts: int = 0
    prefill_s: float = 0.0
    kv_token_bytes: float = 0.0
    move_start_s: float = 0.0
    move_byte_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleRules:
    """Settings. Thresholds are shares of a target: a state is entered at one and left at a lower one. Chosen, all of
    them, but for min_decode, which is the paper's.

    min_prefill, min_decode: instances that remain. hold_s: that a state must last before it is acted on, and between
    two flips. dwell_s: that an instance keeps a role. idle_s: as hold_s, of an idle one. horizon_s: over which a flip
    must pay. margin: the gain over the loss and the cost. instances_a_flip: one flip at a time for so many.
    give_up_s: a drain that takes longer is no longer waited for. rate_s: over which rates are averaged.
    stable_load: what prefill instances that would be left are busy, at most, when one is turned to decode: where they
    could not keep up, their queue would grow, turn it back, be gone, and so on. idle_load: the same of an idle one;
    idle_pressure: what decode instances are busy then, at least.
    """

    min_prefill: int = 1
    min_decode: int = 2
    late_at: float = 0.9
    late_until: float = 0.6
    slow_at: float = 1.0
    slow_until: float = 0.8
    full_at: float = 0.9
    full_until: float = 0.75
    hold_s: float = 2.0
    dwell_s: float = 30.0
    idle_s: float = 10.0
    horizon_s: float = 30.0
    margin: float = 1.25
    instances_a_flip: int = 4
    give_up_s: float = 60.0
    rate_s: float = 10.0
    stable_load: float = 0.9
    idle_load: float = 0.5
    idle_pressure: float = 0.5


@dataclass(frozen=True, slots=True)
class RoleState:
    """now_s: of the last snapshot; None: there was none. flipped_s: when each instance was flipped last. turned_back:
    those of them that were flipped while they were being drained. since: for how long each state has lasted (late,
    slow, full, idle), from when; those that are not entered are missing. prefill_rate: seconds of one instance that
    prompts take of each second; prompt_rate: prompts a second. num_prompts, prefill_s: of the last snapshot."""

    now_s: float | None = None
    flipped_s: Mapping[str, float] = field(default_factory=dict)
    turned_back: frozenset[str] = frozenset()
    since: Mapping[str, float] = field(default_factory=dict)
    prefill_rate: float = 0.0
    prompt_rate: float = 0.0
    num_prompts: int = 0
    prefill_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Flip:
    """name gets this role: new work of that role at once, while what it has of the other is moved away. gain_s, loss_s:
    seconds beyond the targets, over all requests of the horizon, that it spares and that it adds; cost_s: that requests
    wait while they are moved."""

    name: str
    role: Role
    reason: FlipReason
    gain_s: float = 0.0
    loss_s: float = 0.0
    cost_s: float = 0.0


@dataclass(frozen=True, slots=True)
class RolePlan:
    """flips: to be begun now. state: for the next look."""

    flips: tuple[Flip, ...]
    state: RoleState
