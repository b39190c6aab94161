"""The KV tiers: device (l1, l2), host memory (l3), disk (l4), and the lanes between them."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import Metric

from serving.observe.metrics.families import Families
from xllm.stats import EngineStats


def tier_families(make: Families, s: EngineStats) -> Iterator[Metric]:
    """Where prefixes were found; the other families only if there is a tier below the device."""
    yield make.counter_by("tier", "kv_tier_hit_tokens", "Prompt tokens whose KV was found, by where",
                          s.cached_tokens_by_tier_total)
    if not s.kv_tiers:
        return
    tiers = s.kv_tiers
    yield make.gauge_by("tier", "kv_tier_blocks", "Room for KV blocks", {k: t.num_blocks for k, t in tiers.items()})
    yield make.gauge_by("tier", "kv_tier_used_blocks", "KV blocks stored", {k: t.num_used for k, t in tiers.items()})
    yield make.counter_by("tier", "kv_tier_evicted_blocks", "KV blocks evicted",
                          {k: t.evicted_total for k, t in tiers.items()})
    yield make.counter_by("tier", "kv_tier_unsaved_blocks", "KV blocks gone before they were copied further down",
                          {k: t.unsaved_total for k, t in tiers.items()})
    if (disk := tiers.get("disk")) is not None:
        yield make.counter_by("kind", "kv_disk_broken_blocks", "Blocks on disk that were not good", disk.missed_total)
        yield make.gauge_by("tier", "kv_disk_up", "1 while the disk tier works", {"disk": s.kv_disk_up})
    if (host := tiers.get("host")) is not None:
        yield make.gauge("cpu_cache_usage_perc", "Share of host memory's KV blocks in use, 0 to 1",
                         host.num_used / host.num_blocks if host.num_blocks else 0.0)
    yield make.counter("num_swaps", "Preemptions whose KV was copied to host memory", s.swaps_total)
    yield make.counter_by("outcome", "kv_prefetched_blocks", "Blocks brought back before they were asked for",
                          s.prefetched_blocks_total)
    yield from _external_families(make, s)
    yield from _lane_families(make, s)


def _external_families(make: Families, s: EngineStats) -> Iterator[Metric]:
    """Prefix hits below the device, under vLLM's names for a cache outside of it."""
    hits = s.cached_tokens_by_tier_total
    yield make.counter("external_prefix_cache_queries", "Tokens that the device did not have, looked up below it",
                       s.prefix_queries_total - hits.get("l1", 0) - hits.get("l2", 0))
    yield make.counter("external_prefix_cache_hits", "Of these, found in host memory or on disk",
                       hits.get("l3", 0) + hits.get("l4", 0))


def _lane_families(make: Families, s: EngineStats) -> Iterator[Metric]:
    lanes = s.kv_lanes
    yield make.gauge_by("lane", "kv_lane_queued_jobs", "Moves under way or waiting",
                        {k: v.queued for k, v in lanes.items()})
    yield make.counter_by("lane", "kv_lane_bytes", "Bytes moved", {k: v.bytes_total for k, v in lanes.items()})
    yield make.counter_by("lane", "kv_lane_jobs", "Moves done", {k: v.jobs_total for k, v in lanes.items()})
    yield make.counter_by("lane", "kv_lane_busy_seconds", "Time in which bytes moved",
                          {k: v.busy_s_total for k, v in lanes.items()})
    yield make.counter_by("lane", "kv_lane_wait_seconds", "Time from order to end, over all moves",
                          {k: v.wait_s_total for k, v in lanes.items()})
