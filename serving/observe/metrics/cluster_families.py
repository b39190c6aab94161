"""Of a cluster's master: who is there, where requests went, and what went on elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import get_args

from prometheus_client.core import Metric

from serving.observe.metrics.families import Families
from xllm.client.dispatch_counts import CAUSES, DispatchCounts
from xllm.client.handovers import OUTCOMES
from xllm.routing.role_snapshot import FlipReason


def cluster_families(make: Families, counts: DispatchCounts, flips: Mapping[str, int],
                     members: Mapping[str, int]) -> Iterator[Metric]:
    """flips: of roles, by their reasons. members: how many instances are in each state."""
    yield make.gauge_by("state", "cluster_members", "Instances, by their state", members)
    yield make.counter_by("reason", "cluster_decisions", "Calls sent to an instance, by why to that one",
                          counts.decisions)
    yield make.counter_by("cause", "cluster_recoveries", "Calls that went on at another instance, by why",
                          {cause: counts.recovered[cause] for cause in CAUSES})
    yield make.counter_by("outcome", "cluster_handovers", "Calls begun where prompts are computed, by what came of "
                          "having another instance go on", {outcome: counts.handovers[outcome] for outcome in OUTCOMES})
    yield make.counter_by("reason", "cluster_role_flips", "Instances whose role was changed, by why",
                          {reason: flips.get(reason, 0) for reason in get_args(FlipReason)})
    yield make.counter("cluster_retries", "Calls sent to another instance because one had no room", counts.retried)
    yield make.counter("cluster_given_up", "Calls that no instance could go on with", counts.given_up)
    yield make.counter("cluster_recomputed_tokens", "Tokens of prompts and answers that were sent to be computed again",
                       counts.recomputed_tokens)
