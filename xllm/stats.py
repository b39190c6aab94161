"""`EngineStats`: what an engine says about itself, as plain numbers; how each is shown stands with it (`shown.py`).

Counters end in `_total` and only grow; the rest are gauges. Plain types only, so that the value can
be sent anywhere as it is.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

from xllm.shown import counter, derived, gauge, part, stat


@dataclass(frozen=True, slots=True, kw_only=True)
class TierStats:
    """One tier of the KV cache, in blocks.

    missed_total: blocks that should have been there and were not good (damaged on disk), by kind. unsaved_total:
    blocks that left this tier before they were copied further down.
    """

    num_blocks: int = gauge(0, "kv_tier_blocks", "Room for KV blocks")
    num_used: int = gauge(0, "kv_tier_used_blocks", "KV blocks stored")
    num_held: int = gauge(0, "kv_tier_held_blocks", "KV blocks in use, on their way, or kept for what is to come: not "
                          "evictable now")
    evicted_total: int = counter(0, "kv_tier_evicted_blocks", "KV blocks evicted")
    unsaved_total: int = counter(0, "kv_tier_unsaved_blocks", "KV blocks gone before they were copied further down")
    missed_total: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneStats:
    """Moves between two tiers, one way. Seconds: `busy` while bytes moved, `wait` from the order to the end."""

    queued: int = gauge(0, "kv_lane_queued_jobs", "Moves under way or waiting")
    jobs_total: int = counter(0, "kv_lane_jobs", "Moves done")
    bytes_total: int = counter(0, "kv_lane_bytes", "Bytes moved")
    busy_s_total: float = counter(0.0, "kv_lane_busy_seconds", "Time in which bytes moved")
    wait_s_total: float = counter(0.0, "kv_lane_wait_seconds", "Time from order to end, over all moves")


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphStats:
    """Captured graphs. replays: steps through one, by `GraphKey.name`. fallbacks: steps that ran eagerly although the
    device has a graph mode, by reason. fed_steps: those queued before the host knew the tokens of the one before."""

    num_graphs: int = gauge(0, "graphs", "Captured graphs")
    num_bytes: int = gauge(0, "graph_memory_bytes", "Memory of captured graphs")
    captures_total: int = 0
    evictions_total: int = 0
    replays_total: dict[str, int] = counter(dict, "graph_replays", "Steps through a captured graph", by="kind")
    fallbacks_total: dict[str, int] = counter(dict, "graph_fallbacks", "Steps that ran eagerly in spite of graph mode",
                                              by="reason")
    fed_steps_total: int = counter(0, "graph_fed_steps", "Steps queued before the tokens of the one before were read")

    @property
    @derived("counter", "graph_changes", "Graphs captured and evicted", by="change")
    def changes_total(self) -> dict[str, int]:
        return {"capture": self.captures_total, "eviction": self.evictions_total}


@dataclass(frozen=True, slots=True, kw_only=True)
class ThreadStats:
    """CPU threads that compute: now, and at most. lowered: how often there was not a core for each of them."""

    num_threads: int = gauge(0, "cpu_threads",
                             "CPU threads that compute; fewer while other processes keep the cores busy")
    max_threads: int = gauge(0, "cpu_threads_max", "CPU threads that compute when the cores are free")
    lowered_total: int = counter(0, "cpu_threads_lowered", "How often there was not a core for every thread")


@dataclass(kw_only=True)
class Counters:
    """The scheduler's totals since the start; whoever counts does so here."""

    prompt_tokens_total: int = counter(0, "prompt_tokens", "Prompt tokens")
    cached_prompt_tokens_total: int = counter(0, "prompt_tokens_cached", "Prompt tokens whose KV was reused")
    generation_tokens_total: int = counter(0, "generation_tokens", "Generated tokens")
    preemptions_total: int = counter(0, "num_preemptions", "Preemptions")
    swaps_total: int = counter(0, "num_swaps", "Preemptions whose KV was copied to host memory", key="",
                               only="kv_tiers")
    prefix_queries_total: int = counter(0, "prefix_cache_queries", "Tokens looked up in the prefix cache")
    prefix_hits_total: int = counter(0, "prefix_cache_hits", "Tokens found in the prefix cache")
    spec_drafts_total: int = counter(0, "spec_decode_num_drafts", "Drafts, of any number of tokens", key="")
    spec_draft_tokens_total: int = counter(0, "spec_decode_num_draft_tokens", "Draft tokens")
    spec_accepted_tokens_total: int = counter(0, "spec_decode_num_accepted_tokens", "Draft tokens accepted")
    spec_accepted_tokens_by_position_total: list[int] = counter(  # empty: no drafts
        list, "spec_decode_num_accepted_tokens_per_pos", "Draft tokens accepted, by their place in the draft, from 0",
        by="position", only="spec_accepted_tokens_by_position_total")
    requests_finished_total: dict[str, int] = field(default_factory=dict)  # by finish reason
    cached_tokens_by_tier_total: dict[str, int] = counter(  # l1, l2: device, l3: host, l4: disk, l5: store
        dict, "kv_tier_hit_tokens", "Prompt tokens whose KV was found, by where", by="tier",
        key="cached_tokens_by_tier")

    def now(self) -> dict[str, Any]:
        """All of them, by name, as they are now."""
        return {name: copy.copy(value) for name, value in vars(self).items()}


@dataclass(kw_only=True)
class SourceStats:
    """What stands below the device's KV cache. Its own numbers, or none of them."""

    kv_tiers: dict[str, TierStats] = part(dict, TierStats, "kv_tiers", by="tier")  # device, host, disk, store
    kv_lanes: dict[str, LaneStats] = part(dict, LaneStats, "kv_lanes", by="lane")  # `kv/moves.py:LANES`
    prefetched_blocks_total: dict[str, int] = counter(  # right: used in time; wrong: not
        dict, "kv_prefetched_blocks", "Blocks brought back before they were asked for", by="outcome", only="kv_tiers")
    kv_disk_up: bool | None = stat(False, "kv_disk_up")  # there is a disk tier and it has not failed; None: not told
    kv_store_up: bool | None = stat(False, "kv_store_up")  # there is a shared store, and it works; None: not told


@dataclass(kw_only=True)
class EngineStats(Counters, SourceStats):
    """One look at a running engine, not changed afterwards. Times are seconds; `last_step_s` is on the
    `time.monotonic()` clock."""

    num_running: int = gauge(0, "num_requests_running", "Sequences that run")
    num_waiting: int = gauge(0, "num_requests_waiting", "Sequences that wait")  # wherever they wait
    num_waiting_by_reason: dict[str, int] = gauge(
        dict, "num_requests_waiting_by_reason", "Sequences that wait, by what for: capacity (in the queue), kv (blocks "
        "from host memory or disk), grammar, paused", by="reason")
    num_blocks: int = gauge(0, "num_kv_blocks", "KV blocks")
    num_free_blocks: int = gauge(0, "num_free_kv_blocks", "KV blocks that are free or hold evictable prefixes only")
    kv_usage: float = gauge(0.0, "kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1",
                            older="gpu_cache_usage_perc")
    num_steps: int = counter(0, "engine_steps", "Steps")
    last_step_s: float = 0.0
    step_time_s: float = gauge(0.0, "step_time_seconds", "Duration of the last step")
    step_predicted_s: float | None = gauge(None, "step_time_predicted_seconds",
                                           "Duration of the last step as the cost model has it")
    step_cost_error: dict[str, float] = gauge(dict, "step_cost_error_ratio", "How far the cost model was off the last "
                                              "steps, each predicted before it was learnt from", by="quantile",
                                              key="step_cost_error")
    oldest_waiting_s: float = gauge(0.0, "oldest_waiting_seconds", "Age of the oldest request in the queue")
    graphs: GraphStats | None = part(None, GraphStats, "graphs")  # None: no graph mode
    threads: ThreadStats | None = part(None, ThreadStats, "threads")  # None: on an accelerator

    @property
    @derived("gauge", "cpu_cache_usage_perc", "Share of host memory's KV blocks in use, 0 to 1")
    def host_usage(self) -> float | None:
        host = self.kv_tiers.get("host")
        return None if host is None else host.num_used / host.num_blocks if host.num_blocks else 0.0

    @property
    @derived("gauge", "kv_disk_up", "1 while the disk tier or the shared store works", by="tier")
    def disks_up(self) -> dict[str, bool] | None:
        up = {"disk": bool(self.kv_disk_up), "store": bool(self.kv_store_up)}
        return {tier: is_up for tier, is_up in up.items() if tier in self.kv_tiers} or None

    @property
    @derived("counter", "kv_disk_broken_blocks", "Blocks on disk that were not good", by="kind")
    def disk_missed_total(self) -> dict[str, int] | None:
        return self.kv_tiers["disk"].missed_total if "disk" in self.kv_tiers else None

    @property
    @derived("counter", "kv_store_broken_blocks", "Blocks and files of the shared store that were not good", by="kind")
    def store_missed_total(self) -> dict[str, int] | None:
        return self.kv_tiers["store"].missed_total if "store" in self.kv_tiers else None

    @property
    @derived("counter", "external_prefix_cache_queries", "Tokens that the device did not have, looked up below it")
    def external_queries_total(self) -> int | None:
        """This and the next: what is found below the device, under vLLM's names for a cache outside of it."""
        hits = self.cached_tokens_by_tier_total
        return self.prefix_queries_total - hits.get("l1", 0) - hits.get("l2", 0) if self.kv_tiers else None

    @property
    @derived("counter", "external_prefix_cache_hits", "Of these, found in host memory, on disk or in a shared store")
    def external_hits_total(self) -> int | None:
        hits = self.cached_tokens_by_tier_total
        return sum(hits.get(tier, 0) for tier in ("l3", "l4", "l5")) if self.kv_tiers else None
