"""What the engine says about itself: its stats as `xllm/stats.py` declares them, its steps, its KV cache's settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client.core import Metric

from serving.observe.metrics.families import Families
from xllm.client.engine_client import WatchedEngine
from xllm.engine.step_log import STEP_TIME_S, STEP_TOKENS
from xllm.shown import Shown, shown_in


def engine_families(make: Families, engine: WatchedEngine) -> Iterator[Metric]:
    yield from stats_families(make, engine.stats)
    yield make.histogram("iteration_tokens_total", "Tokens computed in a step", engine.steps.tokens, STEP_TOKENS)
    yield make.histogram("engine_step_duration_seconds", "Duration of a step", engine.steps.time_s, STEP_TIME_S)
    if engine.facts is not None:  # None until it has sent its settings
        cache = engine.facts.config.cache
        yield make.info("cache_config_info", "The KV cache's settings, as labels", {
            "block_size": str(cache.block_size), "num_gpu_blocks": str(engine.facts.num_blocks),
            "enable_prefix_caching": str(cache.enable_prefix_caching)})


def stats_families(make: Families, stats: object) -> Iterator[Metric]:
    """The families of a stats struct and of its parts, as `xllm/shown.py` says."""
    for attribute, shown in shown_in(type(stats)).items():  # type: ignore[arg-type]  # mypy: a type has no hash
        value: Any = getattr(stats, attribute)
        if value is None or (shown.only and not getattr(stats, shown.only)):
            continue
        if shown.part is not None:
            yield from _parts(make, shown.part, shown.label, value)
        elif shown.label:
            yield _by(make, shown, shown.label,
                      value if isinstance(value, dict) else {str(place): number for place, number in enumerate(value)})
        elif shown.name:
            one = make.gauge if shown.kind == "gauge" else make.counter
            yield one(shown.name, shown.text, value)
            if shown.older:
                yield one(shown.older, f"Older name of {shown.name}", value)


def _parts(make: Families, struct: type, label: str, value: Any) -> Iterator[Metric]:
    """Of a struct, or of a dict of them by `label`; of an empty one none."""
    if not label:
        yield from stats_families(make, value)
    elif value:
        for attribute, shown in shown_in(struct).items():
            yield _by(make, shown, label, {key: getattr(part, attribute) for key, part in value.items()})


def _by(make: Families, shown: Shown, label: str, values: Mapping[str, float]) -> Metric:
    return (make.gauge_by if shown.kind == "gauge" else make.counter_by)(label, shown.name, shown.text, values)
