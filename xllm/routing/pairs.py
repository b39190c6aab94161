"""`choose_pair`: which instance computes a call's prompt, and which goes on with it. Pure.

Every way to compute the call has a cost: the seconds until its second token, which is the first that the second
instance computes, and the seconds that those lose who are decoded where the prompt is computed. The former are the
queue and the prompt at the one, what is left of the transfer when the prompt has been computed (layers travel while
others are computed, as in "Splitwise", Patel et al., 2024), and a step at the other. What an instance has cached
shortens the prompt at the one and the transfer at the other. A way whose both halves are the same instance has no
transfer, so that one matrix [I, I] compares all ways, its diagonal the requests that stay where they are: how short a
prompt must be to stay at a decode instance follows from the costs and is nobody's constant.

Of the ways that keep both targets the least cost is taken, and of all ways if none does. After xllm-service's SLO_AWARE
policy, which takes the first decode instance that keeps the target, whatever must travel, and needs one at all times.

Letters: I instances, P the one that computes the prompt, D the one that goes on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from xllm.routing.fleet_snapshot import RoutedCall
from xllm.routing.pair_snapshot import PairDecision, PairReason, PairSnapshot
from xllm.routing.ranking import allowed, in_turn
from xllm.routing.roles import HANDS_OVER, ROLES, TAKES_OVER, WHOLE

# Of each role, in the order of `ROLES`: what `_sides` asks of it.
_ABILITIES = np.array([[role in able for role in ROLES] for able in (HANDS_OVER, TAKES_OVER, WHOLE, ("DECODE",))])


@dataclass(frozen=True, slots=True)
class _Sides:
    """Who may do what, bool [I]: compute a prompt that goes elsewhere, go on with one, and compute a whole call."""

    hands_over: np.ndarray
    takes_over: np.ndarray
    whole: np.ndarray


def choose_pair(snapshot: PairSnapshot, call: RoutedCall) -> PairDecision:
    """Who computes the call. Equal ways are told apart by the session's last instance, then by who has the fewest open
    requests, then by whose turn it is. `RoutedCall.draws` are not looked at."""
    names = snapshot.fleet.names
    if not names:
        return PairDecision(None, None, "nobody")
    among, wrong = allowed(snapshot.fleet, call)
    sides = _sides(snapshot, call, among)
    cost_PD = _costs(snapshot, sides)
    keeps_PD = _keeps(snapshot, call) & np.isfinite(cost_PD)
    seen: PairReason | None = None
    if not keeps_PD.any():
        relieved_PD = _costs(snapshot, _Sides(sides.hands_over, sides.takes_over, sides.whole | _relief(snapshot, call,
                                                                                                        sides)))
        seen = "relief" if relieved_PD.min() < cost_PD.min() else "no_slo"
        cost_PD = relieved_PD
    place_p, place_d = _least(snapshot, call, cost_PD, keeps_PD if keeps_PD.any() else np.isfinite(cost_PD))
    reason = wrong or (_lack(snapshot.roles[place_d], sides) if place_p == place_d else None) or seen or (
        "pair" if place_p != place_d else "whole" if snapshot.roles[place_d] in WHOLE else "direct")
    scores = {name: cost for name, cost in zip(names, cost_PD.min(1).tolist(), strict=True) if cost < np.inf}
    return PairDecision(None if place_p == place_d else names[place_p], names[place_d], reason, scores)


def _sides(snapshot: PairSnapshot, call: RoutedCall, among: np.ndarray) -> _Sides:
    """Of those that may be chosen, who may do what."""
    hands_over, takes_over, whole, decodes = _ABILITIES[:, [ROLES.index(role) for role in snapshot.roles]] & among
    if not takes_over.any():
        return _Sides(hands_over, takes_over, among)
    if not (hands_over | whole).any():
        return _Sides(hands_over, takes_over, decodes)
    # A prompt of its own must not make what it decodes, or will by then, wait longer than the target for one token.
    is_gentle = snapshot.next_token_s + snapshot.prefill_s <= call.tpot_s
    return _Sides(hands_over, takes_over, whole | (decodes & is_gentle))


def _relief(snapshot: PairSnapshot, call: RoutedCall, sides: _Sides) -> np.ndarray:
    """Who may compute a whole call if nobody keeps the targets: those who use so little of the target between two
    tokens that the others could take over what they have, (n - 1) / n of it."""
    num = int(np.count_nonzero(sides.takes_over))
    return np.asarray(sides.takes_over & (snapshot.next_token_s * num < call.tpot_s * (num - 1)))


def _lack(role: str, sides: _Sides) -> PairReason | None:
    """Which side has nobody, where one of this role computes a whole call because of that."""
    if role == "PREFILL":
        return "no_decode"
    return "no_prefill" if role == "DECODE" and not (sides.hands_over.any()) else None


def _costs(snapshot: PairSnapshot, sides: _Sides) -> np.ndarray:
    """Seconds until the second token, and what others lose, [P, D]; infinite for what may not be."""
    ttft_P, step_D = snapshot.queue_s + snapshot.prefill_s, snapshot.next_token_s
    lost_P = snapshot.num_running * snapshot.prefill_s  # each that is decoded there waits for the prompt
    # What travels does so while the prompt is computed; the last of it, and the reply, come after.
    rest_PD = np.maximum(snapshot.move_s - snapshot.prefill_s[:, None], snapshot.move_start_s)
    may_PD = sides.hands_over[:, None] & sides.takes_over
    np.fill_diagonal(rest_PD, 0.0)
    np.fill_diagonal(may_PD, sides.whole)
    return np.where(may_PD, (ttft_P + lost_P)[:, None] + rest_PD + step_D, np.inf)


def _keeps(snapshot: PairSnapshot, call: RoutedCall) -> np.ndarray:
    """Which ways keep both targets, bool [P, D]."""
    in_time_P = snapshot.queue_s + snapshot.prefill_s <= call.ttft_s
    return np.asarray(in_time_P[:, None] & (snapshot.next_token_s <= call.tpot_s))


def _least(snapshot: PairSnapshot, call: RoutedCall, cost_PD: np.ndarray, among_PD: np.ndarray) -> tuple[int, int]:
    """The places of the least cost of those that are among them, at least one."""
    equal_PD = among_PD & (cost_PD == np.where(among_PD, cost_PD, np.inf).min())
    if np.count_nonzero(equal_PD) > 1:
        names, num_open = snapshot.fleet.names, snapshot.fleet.num_open
        if call.last in names and equal_PD[:, last := names.index(call.last)].any():
            equal_PD[:, np.arange(len(names)) != last] = False
        open_PD = num_open[:, None] + num_open
        equal_PD &= open_PD == np.where(equal_PD, open_PD, np.inf).min()
    place_d = in_turn(equal_PD.any(0), call.turn)
    return in_turn(equal_PD[:, place_d], snapshot.prefill_turn), place_d
