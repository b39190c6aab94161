"""`round_robin`: one after the other, whatever they have and do."""

from __future__ import annotations

import numpy as np

from xllm.routing.fleet_snapshot import Decision, FleetSnapshot, RoutedCall
from xllm.routing.ranking import in_turn, named


def decide(snapshot: FleetSnapshot, call: RoutedCall) -> Decision:
    """The next in turn that is not full. Scores: how many turns away."""
    away = (np.arange(len(snapshot.names)) - call.turn) % len(snapshot.names)
    if snapshot.is_full.all():
        return named(snapshot, away, in_turn(snapshot.is_full, call.turn), "full")
    return named(snapshot, away, in_turn(~snapshot.is_full, call.turn), "turn")
