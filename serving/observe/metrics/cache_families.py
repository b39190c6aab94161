"""The KV cache on the device."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import Metric

from serving.observe.metrics.families import Families
from xllm.engine.facts import EngineFacts
from xllm.stats import EngineStats


def cache_families(make: Families, s: EngineStats, facts: EngineFacts | None) -> Iterator[Metric]:
    """The families of the device's KV cache. facts: None until the engine has sent its settings."""
    yield make.gauge("kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1", s.kv_usage)
    yield make.gauge("gpu_cache_usage_perc", "Older name of kv_cache_usage_perc", s.kv_usage)
    yield make.gauge("num_kv_blocks", "KV blocks", s.num_blocks)
    yield make.gauge("num_free_kv_blocks", "KV blocks that are free or hold evictable prefixes only", s.num_free_blocks)
    yield make.counter("prompt_tokens_cached", "Prompt tokens whose KV was reused", s.cached_prompt_tokens_total)
    yield make.counter("prefix_cache_queries", "Tokens looked up in the prefix cache", s.prefix_queries_total)
    yield make.counter("prefix_cache_hits", "Tokens found in the prefix cache", s.prefix_hits_total)
    if facts is not None:
        cache = facts.config.cache
        yield make.info("cache_config_info", "The KV cache's settings, as labels", {
            "block_size": str(cache.block_size), "num_gpu_blocks": str(facts.num_blocks),
            "enable_prefix_caching": str(cache.enable_prefix_caching)})
