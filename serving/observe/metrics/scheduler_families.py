"""Requests in the engine, and its steps."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import Metric

from serving.observe.metrics.families import Families
from xllm.client.engine_client import WatchedEngine
from xllm.engine.step_log import STEP_TIME_S, STEP_TOKENS


def scheduler_families(make: Families, engine: WatchedEngine) -> Iterator[Metric]:
    s = engine.stats
    yield make.gauge("num_requests_running", "Sequences that run", s.num_running)
    yield make.gauge("num_requests_waiting", "Sequences that wait", s.num_waiting)
    yield make.gauge_by("reason", "num_requests_waiting_by_reason", "Sequences that wait, by what for: capacity (in "
                        "the queue), kv (blocks from host memory or disk), grammar, paused", s.num_waiting_by_reason)
    yield make.gauge("oldest_waiting_seconds", "Age of the oldest request in the queue", s.oldest_waiting_s)
    yield make.counter("prompt_tokens", "Prompt tokens", s.prompt_tokens_total)
    yield make.counter("generation_tokens", "Generated tokens", s.generation_tokens_total)
    yield make.counter("num_preemptions", "Preemptions", s.preemptions_total)
    yield from _step_families(make, engine)


def _step_families(make: Families, engine: WatchedEngine) -> Iterator[Metric]:
    yield make.counter("engine_steps", "Steps", engine.stats.num_steps)
    yield make.gauge("step_time_seconds", "Duration of the last step", engine.stats.step_time_s)
    yield make.histogram("iteration_tokens_total", "Tokens computed in a step", engine.steps.tokens, STEP_TOKENS)
    yield make.histogram("engine_step_duration_seconds", "Duration of a step", engine.steps.time_s, STEP_TIME_S)
