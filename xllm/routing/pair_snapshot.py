"""`PairSnapshot`: a cluster whose instances have roles, as it stands before a call; `PairDecision`: who computes it.

Letters: I instances.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from xllm.routing.fleet_snapshot import FleetSnapshot, Reason
from xllm.routing.roles import Role

# pair: one computes the prompt, another goes on. direct: a decode instance computes the prompt itself for less than
# another and the transfer would take. whole: an instance that computes whole requests. relief: as direct, because the
# prefill instances would miss the target. no_decode: no decode instance is free: the prefill instance goes on itself.
# no_prefill: there is none to compute the prompt but decode instances. no_slo: nobody keeps the targets; this is the
# soonest. The others: as of a decision for one instance.
PairReason = Reason


@dataclass(frozen=True, slots=True, kw_only=True)
class PairSnapshot:
    """fleet: the instances and what each has of the call's prompts. roles: of each, for new work: an instance that is
    being turned has the new one. prefill_turn: the place of whose turn it is to compute a prompt (`RoutedCall.turn`:
    to go on with one). Of each, as float64 arrays [I], in seconds:

    queue_s: until it would begin with the call's prompt. prefill_s: to compute what it has not cached of it. move_s:
    until what it has not cached has been moved there, were all of it there to be sent; move_start_s: the part of it
    that does not depend on the size. next_token_s: between two tokens with the call among its sequences.
    num_running: sequences that it decodes.
    """

    fleet: FleetSnapshot
    roles: tuple[Role, ...]
    queue_s: np.ndarray
    prefill_s: np.ndarray
    move_s: np.ndarray
    move_start_s: np.ndarray
    next_token_s: np.ndarray
    num_running: np.ndarray
    prefill_turn: int = 0


@dataclass(frozen=True, slots=True)
class PairDecision:
    """prefill: who computes the prompt and hands it over to `decode`; None: `decode` computes all of it. decode: who
    computes the answer; None: there is nobody. scores: for each instance that may compute the prompt, by its name, what
    the call costs if it does, with the best partner, in seconds (`pairs.py`). matched_tokens: of each prompt, found at
    the one that computes it; decode_tokens: found at `decode`."""

    prefill: str | None
    decode: str | None
    reason: PairReason
    scores: dict[str, float] = field(default_factory=dict)
    matched_tokens: tuple[int, ...] = ()
    decode_tokens: tuple[int, ...] = ()

    @property
    def first(self) -> str | None:
        """To whom the request is sent first: the one that computes the prompt."""
        return self.decode if self.prefill is None else self.prefill
