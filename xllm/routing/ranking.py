"""What all policies share: which instances may be chosen, and who is chosen among those that are equal."""

from __future__ import annotations

import numpy as np

from xllm.routing.fleet_snapshot import Decision, FleetSnapshot, Reason, RoutedCall


def allowed(snapshot: FleetSnapshot, call: RoutedCall) -> tuple[np.ndarray, Reason | None]:
    """Who may be chosen, bool [I], and what is wrong with all of them.

    One that is full is taken only if all are; of the others one whose data are stale, if all theirs are; of those that
    are left one without KV memory for the call, if all lack it.
    """
    able = ~snapshot.is_full
    if not able.any():
        return np.ones_like(able), "full"
    fresh = able & ~snapshot.is_stale
    if not fresh.any():
        return able, "stale"
    roomy = fresh & (call.num_tokens - snapshot.device_tokens <= snapshot.free_tokens)
    return (roomy, None) if roomy.any() else (fresh, "no_memory")


def decided(snapshot: FleetSnapshot, call: RoutedCall, cost: np.ndarray, reason: Reason | None = None) -> Decision:
    """The least cost of those that are allowed; where all are stale, the idler of two (`idler_of_two`). reason: why,
    unless there is a weightier one; None: what the choice shows."""
    among, wrong = allowed(snapshot, call)
    if wrong == "stale":
        return named(snapshot, cost, idler_of_two(snapshot, call, among), wrong)
    place, seen = least(snapshot, call, cost, among)
    return named(snapshot, cost, place, wrong or reason or seen)


def named(snapshot: FleetSnapshot, cost: np.ndarray, place: int, reason: Reason) -> Decision:
    """The decision for the instance at this place."""
    return Decision(snapshot.names[place], reason, dict(zip(snapshot.names, cost.tolist(), strict=True)))


def least(snapshot: FleetSnapshot, call: RoutedCall, cost: np.ndarray, among: np.ndarray) -> tuple[int, Reason]:
    """The place of the least cost, and why it is that. Of equal ones: which the session used last, then who has the
    fewest open requests, then whose turn it is."""
    equal = among & (cost == cost[among].min())
    if np.count_nonzero(equal) == 1:
        place = int(equal.argmax())
        has_most = snapshot.saved_tokens[place] > 0 and snapshot.saved_tokens[place] == snapshot.saved_tokens.max()
        return place, "prefix" if has_most else "least_cost"
    if call.last in snapshot.names and equal[place := snapshot.names.index(call.last)]:
        return place, "session"
    fewest = equal & (snapshot.num_open == snapshot.num_open[equal].min())
    if np.count_nonzero(fewest) == 1:
        return int(fewest.argmax()), "fewest_open"
    return in_turn(fewest, call.turn), "turn"


def in_turn(among: np.ndarray, turn: int) -> int:
    """The next place, from `turn` on and around. At least one is among them."""
    places = among.nonzero()[0]
    return int(places[places.searchsorted(turn % len(among)) % len(places)])


def idler_of_two(snapshot: FleetSnapshot, call: RoutedCall, among: np.ndarray) -> int:
    """Of two different ones that are drawn, the one with fewer open requests, which are counted here and so are never
    stale. Two are enough to keep the longest queue short, and unlike the least of all they are not everybody's choice
    at once (Mitzenmacher, 2001: the power of two choices)."""
    places = np.flatnonzero(among)
    first = int(call.draws[0] * len(places))
    second = (first + 1 + int(call.draws[1] * (len(places) - 1))) % len(places)
    return int(min(places[first], places[second], key=lambda place: snapshot.num_open[place]))
