"""Policies of a router, a module each, by name: pure functions of a snapshot and a call."""

from __future__ import annotations

from xllm.routing.fleet_snapshot import Policy
from xllm.routing.policies import at_random, cache_aware, load_aware, round_robin, slo_aware

POLICIES: dict[str, Policy] = {"cache_aware": cache_aware.decide, "load_aware": load_aware.decide,
                               "slo_aware": slo_aware.decide, "round_robin": round_robin.decide,
                               "random": at_random.decide}
# Names of xllm-service's `--load_balance_policy`.
ALIASES = {"RR": "round_robin", "CAR": "cache_aware", "SLO_AWARE": "slo_aware"}


def policy_of(name: str) -> Policy:
    """The policy of this name, or of xllm-service's for it. Raises ValueError if there is none."""
    if (policy := POLICIES.get(ALIASES.get(name, name))) is None:
        raise ValueError(f"unknown routing policy {name!r}; known are {', '.join((*POLICIES, *ALIASES))}")
    return policy
