"""`random`: any of them, whatever they have and do. What other policies are held against."""

from __future__ import annotations

import numpy as np

from xllm.routing.fleet_snapshot import Decision, FleetSnapshot, RoutedCall
from xllm.routing.ranking import named


def decide(snapshot: FleetSnapshot, call: RoutedCall) -> Decision:
    """One of those that are not full, drawn; of all if all are. Scores: 0 for each."""
    places = np.flatnonzero(~snapshot.is_full)
    is_full = not len(places)
    among = np.arange(len(snapshot.names)) if is_full else places
    place = int(among[int(call.draws[0] * len(among))])
    return named(snapshot, np.zeros(len(snapshot.names)), place, "full" if is_full else "drawn")
