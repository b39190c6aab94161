"""Captured graphs, on devices with a graph mode."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import Metric

from serving.observe.metrics.families import Families
from xllm.stats import GraphStats


def graph_families(make: Families, g: GraphStats | None) -> Iterator[Metric]:
    if g is None:
        return
    yield make.gauge("graphs", "Captured graphs", g.num_graphs)
    yield make.gauge("graph_memory_bytes", "Memory of captured graphs", g.num_bytes)
    yield make.counter("graph_fed_steps", "Steps queued before the tokens of the one before were read",
                       g.fed_steps_total)
    yield make.counter_by("kind", "graph_replays", "Steps through a captured graph", g.replays_total)
    yield make.counter_by("reason", "graph_fallbacks", "Steps that ran eagerly in spite of graph mode",
                          g.fallbacks_total)
    yield make.counter_by("change", "graph_changes", "Graphs captured and evicted",
                          {"capture": g.captures_total, "eviction": g.evictions_total})
