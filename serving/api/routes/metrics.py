"""`/metrics`: the engine's stats and the requests' latencies, as `xllm:*` and under vLLM's names as `vllm:*`."""

from __future__ import annotations

from collections.abc import Iterator

from fastapi import Request
from fastapi.responses import Response
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from serving.api.gate import Access
from serving.api.overload_families import overload_families
from serving.api.route import Needs, Route
from serving.api.state import ServerState
from serving.observe.metrics.adapter_families import lora_families
from serving.observe.metrics.engine_families import engine_families
from serving.observe.metrics.families import Families

PREFIXES = ("xllm", "vllm")


class ServerCollector:
    """Makes all metric families when scraped; nothing is updated twice."""

    def __init__(self, state: ServerState):
        self._state = state

    def collect(self) -> Iterator[Metric]:
        name = self._state.served_names[0] if self._state.engine.facts else ""
        for prefix in PREFIXES:
            yield from self._families(Families(prefix, (name, "0")))

    def _families(self, make: Families) -> Iterator[Metric]:
        state, engine = self._state, self._state.engine
        yield from engine_families(make, engine)
        yield from overload_families(make, state)
        yield from state.refusals.families(make, state.keys.kinds)
        if engine.facts is not None:
            yield from lora_families(make, engine.facts.config.lora, state.requests.open_records())
        yield from state.metrics.families(make)


async def metrics(state: ServerState, request: Request) -> Response:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(ServerCollector(state))  # type: ignore[arg-type]
    return Response(generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})


ROUTES = (Route("GET", "/metrics", Access.MONITOR, None, metrics, Needs.NOTHING, is_quiet=True),)
