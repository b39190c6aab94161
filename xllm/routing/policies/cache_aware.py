"""`cache_aware`: to where the call costs least, counted in tokens to compute.

The instance that has the longest prefix of the prompt in its KV cache saves the most, unless its queue costs more than
the prefix saves. Both are counted in tokens to compute, so that one sum decides: what waits there before the call, what
the call itself has left to compute there, and what the running sequences take of each step. This is the cost of
Dynamo's KV router (weight * prefill blocks + decode blocks: docs.nvidia.com/dynamo, KV cache routing) and, without the
last term, the estimate by which Mooncake's Conductor picks a prefill instance (Qin et al., 2024, section 6.1).

Queues balance those who are busy at the same time. While they are not, nothing in that sum keeps one instance from
getting all that begins alike, however little of it is alike; so one that has computed more than its share of late pays
for what it had above. As in consistent hashing with bounded loads (Mirrokni, Thorup and Zadimoghaddam, 2018) the bound
is the mean and a bit; unlike there it is not a wall, because a long prefix may be worth more than balance.
"""

from __future__ import annotations

import numpy as np

from xllm.routing.fleet_snapshot import Decision, FleetSnapshot, RoutedCall
from xllm.routing.ranking import decided

# What an open request of an instance counts for, in tokens to compute. Chosen: about as many as a short answer still
# has to go, so that a prefix of some hundred tokens draws a handful of requests to one before another computes it.
OPEN_REQUEST_TOKENS = 64
# What a token counts for that the call would compute itself. Chosen: computing again what another has keeps others
# waiting, too; several calls that come at once with the same long prefix wait for one instance's work.
WORK_WEIGHT = 1.25
# Of the mean of what instances have computed of late: more than so much is too much. Chosen: below the goal of 1.3.
BOUND = 1.1
# What a token above the bound counts for. Chosen of 0.1, 0.2 and 0.4: on Mooncake's traces they differ by 0.6 points of
# hits at most, and the more the better is light traffic balanced.
SURPLUS_WEIGHT = 0.2


def decide(snapshot: FleetSnapshot, call: RoutedCall) -> Decision:
    """The least cost. Scores: the costs, in tokens."""
    return decided(snapshot, call, costs(snapshot, call))


def costs(snapshot: FleetSnapshot, call: RoutedCall) -> np.ndarray:
    """In tokens to compute: float64 [I]."""
    to_compute = np.maximum(0.0, call.num_tokens - snapshot.saved_tokens)
    spent = snapshot.spent_tokens
    surplus = np.maximum(0.0, spent - BOUND * (spent.sum() / len(spent)))
    return np.asarray(WORK_WEIGHT * to_compute + snapshot.waiting_tokens + OPEN_REQUEST_TOKENS * snapshot.num_open
                      + SURPLUS_WEIGHT * surplus)
