"""`slo_aware`: to where the targets are kept, and of these to where most of the prompt is cached.

After xllm-service's SLO_AWARE, which predicts the time to the first token from what waits at an instance, and the time
between tokens from what runs there. Its other half turns prefill instances into decode instances and back: see
`role_plan.py`. It predicts by a parabola over the prompt's length, fitted when an instance starts; here the speed is
that of late, and what is cached need not be computed.
"""

from __future__ import annotations

import numpy as np

from xllm.routing.fleet_snapshot import Decision, FleetSnapshot, RoutedCall
from xllm.routing.ranking import allowed, decided, least, named


def decide(snapshot: FleetSnapshot, call: RoutedCall) -> Decision:
    """Of those that keep both targets the one that has the most of the prompt; if none does, the soonest. Scores: the
    seconds until the first token as predicted."""
    ttft_s = first_token_s(snapshot, call)
    among, wrong = allowed(snapshot, call)
    good = among & (ttft_s <= call.ttft_s) & (snapshot.next_token_s <= call.tpot_s)
    if wrong is not None or not good.any():
        return decided(snapshot, call, ttft_s, "no_slo")
    return named(snapshot, ttft_s, least(snapshot, call, -snapshot.saved_tokens, good)[0], "slo")


def first_token_s(snapshot: FleetSnapshot, call: RoutedCall) -> np.ndarray:
    """Seconds until the call's first token, if each computed what it has in turn: float64 [I]."""
    to_compute = np.maximum(0.0, call.num_tokens - snapshot.saved_tokens)
    return np.asarray((snapshot.waiting_tokens + to_compute) / snapshot.prefill_tokens_per_s)
