"""`pair_snapshot`: predicts what a call costs each instance, from what each is known to take; `role_snapshot`: how much
each has to do.

Letters: I instances.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np

from xllm.routing.fleet_snapshot import FleetSnapshot
from xllm.routing.pace import PREFILL_TOKENS_PER_S, STEP_S
from xllm.routing.pair_snapshot import PairSnapshot
from xllm.routing.predictors import PrefillCurve
from xllm.routing.role_snapshot import RoleSnapshot, RoleView
from xllm.routing.roles import Role
from xllm.routing.routed_instance import STALE_S, Figures

# What is assumed of moves before there were any. Chosen: what TCP does on one machine without checksums is about 1 GB/s
# (benchmarks/results/transfer.json); they decide only until requests have been handed over.
MOVE_START_S, MOVE_BYTE_S = 1e-3, 1e-9


class PairCall(NamedTuple):
    """What of a call decides what it costs. num_prompts: that differ; of num_tokens in all. num_requests: sequences."""

    num_prompts: int
    num_tokens: int
    num_requests: int


def pair_snapshot(fleet: FleetSnapshot, figures: Figures, roles: tuple[Role, ...], matched_I: np.ndarray,
                  call: PairCall, prefill_turn: int = 0) -> PairSnapshot:
    """fleet: before this call. figures: of the same instances. matched_I: tokens of the call's prompts that each has
    cached, in any tier."""
    start_s, token_s, square_s = _prompt_prices(figures)
    new = np.maximum(0.0, call.num_tokens - fleet.saved_tokens)
    cached = call.num_tokens - new
    squares = new * (new + 2.0 * cached) / max(1, call.num_prompts)  # as if all were of the same length
    move_start_s = filled(figures.move_start_s, MOVE_START_S)
    num_bytes = np.maximum(0, call.num_tokens - matched_I) * figures.kv_token_bytes
    return PairSnapshot(
        fleet=fleet, roles=roles,
        queue_s=figures.num_waiting * start_s + figures.waiting_tokens * token_s + figures.waiting_squares * square_s,
        prefill_s=start_s * call.num_prompts + token_s * new + square_s * squares,
        move_s=move_start_s + num_bytes * filled(figures.move_byte_s, MOVE_BYTE_S), move_start_s=move_start_s,
        next_token_s=_next_token_s(figures, call.num_requests, call.num_tokens),
        num_running=figures.num_running, prefill_turn=prefill_turn)


def role_snapshot(names: tuple[str, ...], roles: tuple[Role, ...], figures: Figures, turned_from: Mapping[str, Role],
                  fixed: Collection[str], *, now_s: float, ttft_s: float, tpot_s: float, num_prompts: int,
                  prefill_s: float) -> RoleSnapshot:
    """figures: of the instances with these names and roles. The rest as in `RoleSnapshot` and `RoleView`."""
    start_s, token_s, square_s = _prompt_prices(figures)
    queue_s = figures.num_waiting * start_s + figures.waiting_tokens * token_s + figures.waiting_squares * square_s
    columns = (queue_s, figures.num_waiting, figures.num_running, figures.num_tokens - figures.free_tokens,
               figures.num_tokens, _next_token_s(figures, 0, 0), now_s - figures.heard_s <= STALE_S)
    views = tuple(
        RoleView(name=name, role=role, turned_from=turned_from.get(name), is_flexible=name not in fixed, is_up=is_up,
                 queue_s=queue, num_waiting=int(num_waiting), num_running=int(num_running), used_tokens=int(used),
                 num_tokens=int(num_tokens), next_token_s=next_s)
        for name, role, queue, num_waiting, num_running, used, num_tokens, next_s, is_up
        in zip(names, roles, *(np.asarray(column).tolist() for column in columns), strict=True))
    return RoleSnapshot(now_s=now_s, instances=views, ttft_s=ttft_s, tpot_s=tpot_s, num_prompts=num_prompts,
                        prefill_s=prefill_s, kv_token_bytes=float(np.max(figures.kv_token_bytes, initial=0.0)),
                        move_start_s=float(np.mean(filled(figures.move_start_s, MOVE_START_S))) if names else 0.0,
                        move_byte_s=float(np.mean(filled(figures.move_byte_s, MOVE_BYTE_S))) if names else 0.0)


def prompt_curve(figures: np.ndarray) -> PrefillCurve:
    """Of one instance's figures (`RoutedInstance.figures`), or what is assumed."""
    known = Figures(*figures.tolist())
    if math.isnan(known.prompt_start_s):
        return PrefillCurve(STEP_S, 1.0 / PREFILL_TOKENS_PER_S, 0.0)
    token_s = 1.0 / PREFILL_TOKENS_PER_S if math.isnan(known.prompt_token_s) else known.prompt_token_s
    return PrefillCurve(known.prompt_start_s, token_s, known.prompt_square_s)


def _prompt_prices(figures: Figures) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return (filled(figures.prompt_start_s, STEP_S), filled(figures.prompt_token_s, 1.0 / PREFILL_TOKENS_PER_S),
            filled(figures.prompt_square_s, 0.0))


def _next_token_s(figures: Figures, num_seqs: int, num_tokens: int) -> np.ndarray:
    """Seconds of a step with so many sequences more, of so many tokens."""
    used = figures.num_tokens - figures.free_tokens
    return np.asarray(filled(figures.decode_step_s, STEP_S)
                      + filled(figures.decode_sequence_s, 0.0) * (figures.num_running + num_seqs)
                      + filled(figures.decode_token_s, 0.0) * (used + num_tokens))


def filled(values: np.ndarray, assumed: float) -> np.ndarray:
    """With the mean of those that are known for those that are not (nan); `assumed`, if none is known."""
    if not (unknown := np.isnan(values)).any():
        return values
    return np.where(unknown, assumed if unknown.all() else values[~unknown].mean(), values)
