"""How the engines are, and what the server did to stay up."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import Metric

from serving.api.state import ServerState
from serving.config import END_REASONS
from serving.engine.waiting import CLASS_NAMES
from serving.observe.metrics.families import Families
from xllm import logs

SLEEP_STATES = ("awake", "weights_offloaded", "discard_all")  # vLLM's names, by sleep level


def queue_families(make: Families, state: ServerState) -> Iterator[Metric]:
    """Of all engines of a model together."""
    waiting = state.admission.waiting
    yield make.gauge("queue_tokens", "Prompt tokens that wait for their first output", waiting.num_tokens)
    yield make.counter_by("kind", "requests_refused", "Requests that found the queue too full",
                          dict(zip(CLASS_NAMES, waiting.num_refused)))
    yield make.counter_by("kind", "requests_shed", "Waiting requests that made room for better ones",
                          dict(zip(CLASS_NAMES, waiting.num_shed)))


def server_families(make: Families, state: ServerState) -> Iterator[Metric]:
    """Of the server as a whole."""
    yield make.counter_by("reason", "connections_closed", "Connections that the server ended",
                          {reason: state.closed_connections[reason] for reason in END_REASONS})
    yield make.counter("log_lines_lost", "Log lines of the API process that nobody read in time", logs.num_lost())


def life_families(make: Families, state: ServerState, number: int) -> Iterator[Metric]:
    """Of the engine of that number."""
    engine = state.engine.engines[number]
    yield make.gauge("engine_up", "1 while the engine takes requests", float(engine.is_up))
    yield make.gauge("engine_silent_seconds", "Since the last sign of progress", engine.silent_for_s())
    yield make.gauge_by("sleep_state", "engine_sleep_state", "1 for the state that the engine is in",
                        {name: level == engine.sleep_level for level, name in enumerate(SLEEP_STATES)})
    if state.supervisors:
        yield make.counter("engine_restarts", "Times that the engine was started again",
                           state.supervisors[number].num_restarts)
