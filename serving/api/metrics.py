"""`/metrics`: the engine's stats and the requests' latencies, as `xllm:*` and under vLLM's names as `vllm:*`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from fastapi import APIRouter
from fastapi.responses import Response
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from serving.config import END_REASONS
from serving.step_log import STEP_TIME_S, STEP_TOKENS, Buckets
from serving.waiting import CLASS_NAMES

if TYPE_CHECKING:
    from serving.request_log import RequestRecord
    from serving.state import ServerState

PREFIXES = ("xllm", "vllm")
LABELS = ("model_name", "engine")

SHORT_S = STEP_TIME_S
LONG_S = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0,
          1280.0)
TOKENS = tuple(float(step * 10**power) for power in range(6) for step in (1, 2, 5))
COUNTS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)


class Histogram:
    """Counts per bucket. Not thread-safe; the event loop owns it."""

    def __init__(self, help: str, bounds: tuple[float, ...]):
        self.help, self.bounds = help, bounds
        self._buckets = Buckets([0] * (len(bounds) + 1))

    def observe(self, value: float) -> None:
        self._buckets.observe(value, self.bounds)

    @property
    def count(self) -> int:
        return sum(self._buckets.counts)

    def family(self, name: str, labels: tuple[str, ...]) -> HistogramMetricFamily:
        return histogram_family(name, self.help, self._buckets, self.bounds, labels)


def histogram_family(name: str, help: str, buckets: Buckets, bounds: tuple[float, ...],
                     labels: tuple[str, ...]) -> HistogramMetricFamily:
    total, cumulated = 0, []
    for bound, count in zip((*map(str, bounds), "+Inf"), buckets.counts, strict=True):
        total += count
        cumulated.append((bound, total))
    family = HistogramMetricFamily(name, help, labels=LABELS)
    family.add_metric(labels, cumulated, buckets.sum)
    return family


class RequestMetrics:
    """What the HTTP side measures itself. A request is one choice: `n` of them for n choices."""

    def __init__(self) -> None:
        self.time_to_first_token_seconds = Histogram("Arrival to first token", LONG_S)
        self.inter_token_latency_seconds = Histogram("Between two tokens of a request", SHORT_S)
        self.request_time_per_output_token_seconds = Histogram("Mean time per output token of a request", SHORT_S)
        self.request_queue_time_seconds = Histogram("Arrival to the first step that it takes part in", LONG_S)
        self.request_prefill_time_seconds = Histogram("First step to first token", LONG_S)
        self.request_decode_time_seconds = Histogram("First token to last token", LONG_S)
        self.request_inference_time_seconds = Histogram("First step to last token", LONG_S)
        self.request_prefill_kv_computed_tokens = Histogram("Prompt tokens that no cache had", TOKENS)
        self.e2e_request_latency_seconds = Histogram("Arrival to last token", LONG_S)
        self.request_prompt_tokens = Histogram("Prompt length", TOKENS)
        self.request_generation_tokens = Histogram("Output length", TOKENS)
        self.request_max_num_generation_tokens = Histogram("Longest output of a call", TOKENS)
        self.request_params_max_tokens = Histogram("max_tokens as asked for", TOKENS)
        self.request_params_n = Histogram("n as asked for", COUNTS)
        self.request_num_preemptions = Histogram("Preemptions of a request", (0.0, *COUNTS))
        self.admission_rejections = 0  # calls that found the queue full
        self.request_success: dict[str, int] = {"stop": 0, "length": 0, "abort": 0, "error": 0}
        self.prompt_tokens_by_source: dict[str, int] = {"local_compute": 0, "local_cache_hit": 0,
                                                        "external_kv_transfer": 0}

    def observe_phases(self, record: RequestRecord, cached_by_tier: dict[str, int]) -> None:
        """Take in a request that ended well."""
        for histogram, value in ((self.request_queue_time_seconds, record.queue_s),
                                 (self.request_prefill_time_seconds, record.prefill_s),
                                 (self.request_inference_time_seconds, record.inference_s)):
            if value is not None:
                histogram.observe(value)
        computed = max(0, record.num_prompt_tokens - record.num_cached_tokens)
        self.request_prefill_kv_computed_tokens.observe(computed)
        transferred = cached_by_tier.get("l3", 0) + cached_by_tier.get("l4", 0)
        self.prompt_tokens_by_source["local_compute"] += computed
        self.prompt_tokens_by_source["external_kv_transfer"] += transferred
        self.prompt_tokens_by_source["local_cache_hit"] += max(0, record.num_cached_tokens - transferred)

    def families(self, prefix: str, labels: tuple[str, ...]) -> Iterator[Metric]:
        for name, value in vars(self).items():
            if isinstance(value, Histogram):
                yield value.family(f"{prefix}:{name}", labels)
        # Its older name, which dashboards still ask for.
        yield self.inter_token_latency_seconds.family(f"{prefix}:time_per_output_token_seconds", labels)
        rejections = CounterMetricFamily(f"{prefix}:admission_rejections", "Calls that were turned away",
                                         labels=(*LABELS, "reason"))
        rejections.add_metric((*labels, "queue_full"), self.admission_rejections)
        yield rejections
        family = CounterMetricFamily(f"{prefix}:request_success", "Finished requests",
                                     labels=(*LABELS, "finished_reason"))
        for reason, count in self.request_success.items():
            family.add_metric((*labels, reason), count)
        yield family
        sources = CounterMetricFamily(f"{prefix}:prompt_tokens_by_source",
                                      "Prompt tokens of requests that ended well, by where their KV came from",
                                      labels=(*LABELS, "source"))
        for source, count in self.prompt_tokens_by_source.items():
            sources.add_metric((*labels, source), count)
        yield sources


class ServerCollector:
    """Makes all metric families when scraped; nothing is updated twice."""

    def __init__(self, state: ServerState):
        self._state = state

    def collect(self) -> Iterator[Metric]:
        name = self._state.served_names[0] if self._state.engine.ready else ""
        for prefix in PREFIXES:
            yield from self._engine_families(prefix, (name, "0"))
            yield from self._state.metrics.families(prefix, (name, "0"))

    def _engine_families(self, prefix: str, labels: tuple[str, ...]) -> Iterable[Metric]:
        s = self._state.engine.stats
        gauges = {
            "num_requests_running": (s.num_running, "Sequences that run"),
            "num_requests_waiting": (s.num_waiting, "Sequences in the queue"),
            "kv_cache_usage_perc": (s.kv_usage, "Share of KV blocks in use, 0 to 1"),
            "gpu_cache_usage_perc": (s.kv_usage, "Older name of kv_cache_usage_perc"),
            "num_kv_blocks": (s.num_blocks, "KV blocks"),
            "num_free_kv_blocks": (s.num_free_blocks, "KV blocks that are free or hold evictable prefixes only"),
            "step_time_seconds": (s.step_time_s, "Duration of the last step"),
            "oldest_waiting_seconds": (s.oldest_waiting_s, "Age of the oldest request in the queue"),
            "engine_silent_seconds": (self._state.engine.silent_for_s(), "Since the last sign of progress"),
            "engine_up": (float(self._state.engine.is_up), "1 while the engine takes requests"),
            "queue_tokens": (self._state.engine.waiting.num_tokens, "Prompt tokens that wait for their first output"),
        }
        counters = {
            "engine_steps": (s.num_steps, "Steps"),
            "prompt_tokens": (s.prompt_tokens_total, "Prompt tokens"),
            "prompt_tokens_cached": (s.cached_prompt_tokens_total, "Prompt tokens whose KV was reused"),
            "generation_tokens": (s.generation_tokens_total, "Generated tokens"),
            "num_preemptions": (s.preemptions_total, "Preemptions"),
            "prefix_cache_queries": (s.prefix_queries_total, "Tokens looked up in the prefix cache"),
            "prefix_cache_hits": (s.prefix_hits_total, "Tokens found in the prefix cache"),
            "spec_decode_num_drafts": (s.spec_drafts_total, "Drafts, of any number of tokens"),
            "spec_decode_num_draft_tokens": (s.spec_draft_tokens_total, "Draft tokens"),
            "spec_decode_num_accepted_tokens": (s.spec_accepted_tokens_total, "Draft tokens accepted"),
        }
        if (supervisor := self._state.supervisor) is not None:
            counters["engine_restarts"] = (supervisor.num_restarts, "Times that the engine was started again")
        if s.graphs is not None:
            counters["graph_fed_steps"] = (s.graphs.fed_steps_total,
                                           "Steps queued before the tokens of the one before were read")
        for name, (value, text) in gauges.items():
            gauge = GaugeMetricFamily(f"{prefix}:{name}", text, labels=LABELS)
            gauge.add_metric(labels, value)
            yield gauge
        waiting = GaugeMetricFamily(f"{prefix}:num_requests_waiting_by_reason", "Sequences in the queue, by why",
                                    labels=(*LABELS, "reason"))
        waiting.add_metric((*labels, "capacity"), s.num_waiting)
        waiting.add_metric((*labels, "deferred"), 0)  # nothing here waits for anything but room
        yield waiting
        for name, (value, text) in counters.items():
            counter = CounterMetricFamily(f"{prefix}:{name}", text, labels=LABELS)
            counter.add_metric(labels, value)
            yield counter
        steps = self._state.engine.steps
        for name, text, buckets, bounds in (
                ("iteration_tokens_total", "Tokens computed in a step", steps.tokens, STEP_TOKENS),
                ("engine_step_duration_seconds", "Duration of a step", steps.time_s, STEP_TIME_S)):
            yield histogram_family(f"{prefix}:{name}", text, buckets, bounds, labels)
        yield from self._overload_families(prefix, labels)
        yield from self._tier_families(prefix, labels)
        yield from self._graph_families(prefix, labels)
        if (ready := self._state.engine.ready) is not None:
            cache = ready.config.cache
            facts = {"block_size": str(cache.block_size), "num_gpu_blocks": str(ready.num_blocks),
                     "enable_prefix_caching": str(cache.enable_prefix_caching)}
            info = GaugeMetricFamily(f"{prefix}:cache_config_info", "The KV cache's settings, as labels",
                                     labels=(*LABELS, *facts))
            info.add_metric((*labels, *facts.values()), 1)
            yield info

    def _overload_families(self, prefix: str, labels: tuple[str, ...]) -> Iterator[Metric]:
        """What was turned away."""
        waiting = self._state.engine.waiting
        for name, text, label, values in (
                ("requests_refused", "Requests that found the queue too full", "kind",
                 dict(zip(CLASS_NAMES, waiting.num_refused))),
                ("requests_shed", "Waiting requests that made room for better ones", "kind",
                 dict(zip(CLASS_NAMES, waiting.num_shed))),
                ("connections_closed", "Connections that the server ended", "reason",
                 {reason: self._state.closed_connections[reason] for reason in END_REASONS})):
            counter = CounterMetricFamily(f"{prefix}:{name}", text, labels=(*LABELS, label))
            for key, value in values.items():
                counter.add_metric((*labels, key), value)
            yield counter

    def _tier_families(self, prefix: str, labels: tuple[str, ...]) -> Iterator[Metric]:
        """The KV tiers: device (l1, l2), host memory (l3), disk (l4), and the lanes between them."""
        s = self._state.engine.stats
        if not s.kv_tiers:
            return

        def family(kind: type, name: str, text: str, label: str, values: dict[str, float]) -> Metric:
            made = kind(f"{prefix}:{name}", text, labels=(*LABELS, label))
            for key, value in values.items():
                made.add_metric((*labels, key), value)
            return made

        gauge, counter = GaugeMetricFamily, CounterMetricFamily
        tiers, lanes = s.kv_tiers, s.kv_lanes
        yield family(gauge, "kv_tier_blocks", "Room for KV blocks", "tier", {k: t.num_blocks for k, t in tiers.items()})
        yield family(gauge, "kv_tier_used_blocks", "KV blocks stored", "tier",
                     {k: t.num_used for k, t in tiers.items()})
        yield family(counter, "kv_tier_evicted_blocks", "KV blocks evicted", "tier",
                     {k: t.evicted_total for k, t in tiers.items()})
        yield family(counter, "kv_tier_unsaved_blocks", "KV blocks gone before they were copied further down", "tier",
                     {k: t.unsaved_total for k, t in tiers.items()})
        yield family(counter, "kv_tier_hit_tokens", "Prompt tokens whose KV was found, by where", "tier",
                     dict(s.cached_tokens_by_tier_total))
        if "disk" in tiers:
            yield family(counter, "kv_disk_broken_blocks", "Blocks on disk that were not good", "kind",
                         dict(tiers["disk"].missed_total))
            yield family(gauge, "kv_disk_up", "1 while the disk tier works", "tier", {"disk": float(s.kv_disk_up)})
        yield family(gauge, "kv_lane_queued_jobs", "Moves under way or waiting", "lane",
                     {k: v.queued for k, v in lanes.items()})
        yield family(counter, "kv_lane_bytes", "Bytes moved", "lane", {k: v.bytes_total for k, v in lanes.items()})
        yield family(counter, "kv_lane_jobs", "Moves done", "lane", {k: v.jobs_total for k, v in lanes.items()})
        yield family(counter, "kv_lane_busy_seconds", "Time in which bytes moved", "lane",
                     {k: v.busy_s_total for k, v in lanes.items()})
        yield family(counter, "kv_lane_wait_seconds", "Time from order to end, over all moves", "lane",
                     {k: v.wait_s_total for k, v in lanes.items()})
        yield family(counter, "kv_prefetched_blocks", "Blocks brought back before they were asked for", "outcome",
                     dict(s.prefetched_blocks_total))
        hits = s.cached_tokens_by_tier_total
        for name, text, value in (
                ("external_prefix_cache_queries", "Tokens that the device did not have, looked up below it",
                 s.prefix_queries_total - hits.get("l1", 0) - hits.get("l2", 0)),
                ("external_prefix_cache_hits", "Of these, found in host memory or on disk",
                 hits.get("l3", 0) + hits.get("l4", 0))):
            external = counter(f"{prefix}:{name}", text, labels=LABELS)
            external.add_metric(labels, value)
            yield external
        if (host := tiers.get("host")) is not None:
            usage = gauge(f"{prefix}:cpu_cache_usage_perc", "Share of host memory's KV blocks in use, 0 to 1",
                          labels=LABELS)
            usage.add_metric(labels, host.num_used / host.num_blocks if host.num_blocks else 0.0)
            yield usage
        swaps = counter(f"{prefix}:num_swaps", "Preemptions whose KV was copied to host memory", labels=LABELS)
        swaps.add_metric(labels, s.swaps_total)
        yield swaps

    def _graph_families(self, prefix: str, labels: tuple[str, ...]) -> Iterator[Metric]:
        """Captured graphs, on devices with a graph mode."""
        g = self._state.engine.stats.graphs
        if g is None:
            return
        for name, text, value in (("graphs", "Captured graphs", g.num_graphs),
                                  ("graph_memory_bytes", "Memory of captured graphs", g.num_bytes)):
            gauge = GaugeMetricFamily(f"{prefix}:{name}", text, labels=LABELS)
            gauge.add_metric(labels, value)
            yield gauge
        for name, text, label, values in (
                ("graph_replays", "Steps through a captured graph", "kind", g.replays_total),
                ("graph_fallbacks", "Steps that ran eagerly in spite of graph mode", "reason", g.fallbacks_total),
                ("graph_changes", "Graphs captured and evicted", "change",
                 {"capture": g.captures_total, "eviction": g.evictions_total})):
            counter = CounterMetricFamily(f"{prefix}:{name}", text, labels=(*LABELS, label))
            for key, value in values.items():
                counter.add_metric((*labels, key), value)
            yield counter


def router(state: ServerState) -> APIRouter:
    routes = APIRouter()
    registry = CollectorRegistry(auto_describe=False)
    registry.register(ServerCollector(state))  # type: ignore[arg-type]

    @routes.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    return routes
