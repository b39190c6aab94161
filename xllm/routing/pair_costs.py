"""`pair_snapshot`: predicts what a call costs each instance, from what each is known to take.

Letters: I instances.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from xllm.routing.fleet_snapshot import FleetSnapshot
from xllm.routing.pace import PREFILL_TOKENS_PER_S, STEP_S
from xllm.routing.pair_snapshot import PairSnapshot
from xllm.routing.routed_instance import Figures

# What is assumed of moves before there were any: a connection on one machine. Measured with the bundled transports over
# loopback these are 1 ms and about 1 GB/s; they decide only until the first request has been handed over.
MOVE_START_S, MOVE_BYTE_S = 1e-3, 1e-9


class PairCall(NamedTuple):
    """What of a call decides what it costs. num_prompts: that differ; of num_tokens in all. num_requests: sequences."""

    num_prompts: int
    num_tokens: int
    num_requests: int


def pair_snapshot(fleet: FleetSnapshot, figures: Figures, roles: tuple[str, ...], matched_I: np.ndarray,
                  call: PairCall, prefill_turn: int = 0) -> PairSnapshot:
    """fleet: before this call. figures: of the same instances. matched_I: tokens of the call's prompts that each has
    cached, in any tier."""
    start_s = filled(figures.prompt_start_s, STEP_S)
    token_s = filled(figures.prompt_token_s, 1.0 / PREFILL_TOKENS_PER_S)
    square_s = filled(figures.prompt_square_s, 0.0)
    new = np.maximum(0.0, call.num_tokens - fleet.saved_tokens)
    cached = call.num_tokens - new
    squares = new * (new + 2.0 * cached) / max(1, call.num_prompts)  # as if all were of the same length
    move_start_s = filled(figures.move_start_s, MOVE_START_S)
    num_bytes = np.maximum(0, call.num_tokens - matched_I) * figures.kv_token_bytes
    num_running = np.asarray(figures.num_running)
    used = figures.num_tokens - figures.free_tokens
    return PairSnapshot(
        fleet=fleet, roles=roles,
        queue_s=figures.num_waiting * start_s + figures.waiting_tokens * token_s + figures.waiting_squares * square_s,
        prefill_s=start_s * call.num_prompts + token_s * new + square_s * squares,
        move_s=move_start_s + num_bytes * filled(figures.move_byte_s, MOVE_BYTE_S), move_start_s=move_start_s,
        next_token_s=(filled(figures.decode_step_s, STEP_S)
                      + filled(figures.decode_sequence_s, 0.0) * (num_running + call.num_requests)
                      + filled(figures.decode_token_s, 0.0) * (used + call.num_tokens)),
        num_running=num_running, prefill_turn=prefill_turn)


def filled(values: np.ndarray, assumed: float) -> np.ndarray:
    """With the mean of those that are known for those that are not (nan); `assumed`, if none is known."""
    if not (unknown := np.isnan(values)).any():
        return values
    return np.where(unknown, assumed if unknown.all() else values[~unknown].mean(), values)
