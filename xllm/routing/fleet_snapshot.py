"""`FleetSnapshot`: several instances as they stand before a call, `RoutedCall`: the call, `Decision`: where it goes.

Letters: I instances, T tiers (`kv/block.py:TIERS`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

# prefix: it has the most of the prompt, of all. least_cost: another has as much or more, and more to do. slo: it keeps
# the targets; no_slo: none does, and it is the soonest. session, fewest_open, turn: it was among equals, and this told
# them apart. drawn: nothing was looked at but queues. stale: of none it is known how it is, and it is the idler of two
# that were drawn. no_memory: the best, but none has KV memory for the call; full: the best, but all would refuse it.
# nobody: there is none to choose.
Reason = Literal["prefix", "least_cost", "slo", "no_slo", "session", "fewest_open", "turn", "drawn", "stale",
                 "no_memory", "full", "nobody", "handed_over", "pair", "direct", "whole", "relief", "no_decode",
                 "no_prefill"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetSnapshot:
    """names: those that may be chosen, at least one, in the order in which they take turns. Of each, as arrays [I]:

    saved_tokens: of the call's prompts, spared there from computing: float64, what must be loaded counted in part.
    device_tokens: of them, found on the device or promised. waiting_tokens: to compute, sent there and not begun.
    num_open: requests sent there that have not ended, and those that others have there. num_queued: of these, how many
    have not begun. num_tokens: of its KV cache; free_tokens: of them, room left when it last said so, less what was
    sent since. spent_tokens: computed there of late, for balance. is_full: it would refuse the call. is_stale: what it
    has said is out of date. prefill_tokens_per_s; next_token_s: seconds between two tokens with the call among its
    sequences.
    """

    names: tuple[str, ...]
    saved_tokens: np.ndarray
    device_tokens: np.ndarray
    waiting_tokens: np.ndarray
    num_open: np.ndarray
    num_queued: np.ndarray
    num_tokens: np.ndarray
    free_tokens: np.ndarray
    spent_tokens: np.ndarray
    is_full: np.ndarray
    is_stale: np.ndarray
    prefill_tokens_per_s: np.ndarray
    next_token_s: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutedCall:
    """A call whose prompts have so many tokens. last: the instance that its session used last. turn: the place of whom
    it is the turn, modulo their number. draws: two numbers in [0, 1), drawn at random. ttft_s, tpot_s: targets."""

    num_tokens: int
    last: str | None = None
    turn: int = 0
    draws: tuple[float, float] = (0.0, 0.0)
    ttft_s: float
    tpot_s: float


@dataclass(frozen=True, slots=True)
class Decision:
    """name: of the instance; None: there is none. scores: of each instance that could have been chosen, by its name;
    the least is the best. matched_tokens: of each prompt, found at the one that was chosen."""

    name: str | None
    reason: Reason
    scores: dict[str, float] = field(default_factory=dict)
    matched_tokens: tuple[int, ...] = ()


Policy = Callable[[FleetSnapshot, RoutedCall], Decision]
