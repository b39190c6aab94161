"""`/metrics`: the engine's stats and the requests' latencies, as `xllm:*` and under vLLM's names as `vllm:*`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from fastapi import Request
from fastapi.responses import Response
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from serving.api.gate import Access
from serving.api.overload_families import life_families, overload_families
from serving.api.route import Needs, Route
from serving.api.state import ServerState
from serving.observe.metrics.adapter_families import lora_families
from serving.observe.metrics.cluster_families import cluster_families
from serving.observe.metrics.engine_families import engine_families
from serving.observe.metrics.families import Families, joined

PREFIXES = ("xllm", "vllm")


class ServerCollector:
    """Makes all metric families when scraped; nothing is updated twice."""

    def __init__(self, state: ServerState):
        self._state = state

    def collect(self) -> Iterator[Metric]:
        name = self._state.served_names[0] if self._state.engine.facts else ""
        for prefix in PREFIXES:
            makes = [Families(prefix, (name, str(number))) for number in range(len(self._state.engine.engines))]
            yield from joined(self._of_engine(make, number) for number, make in enumerate(makes))
            yield from self._of_server(makes[0])

    def _of_engine(self, make: Families, number: int) -> Iterator[Metric]:
        state = self._state
        yield from engine_families(make, state.engine.engines[number])
        yield from life_families(make, state, number)
        yield from state.metrics[number].families(make)

    def _of_server(self, make: Families) -> Iterator[Metric]:
        """What is one for all engines stands under the first, where whoever picks engines finds it."""
        state, facts = self._state, self._state.engine.facts
        yield from overload_families(make, state)
        yield from state.refusals.families(make, state.keys.kinds)
        if state.cluster is not None:
            yield from cluster_families(make, state.cluster.engine.counts, Counter(
                member.state for member in state.cluster.members()))
        if facts is not None:
            yield from lora_families(make, facts.config.lora, state.requests.open_records())


async def metrics(state: ServerState, request: Request) -> Response:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(ServerCollector(state))  # type: ignore[arg-type]
    return Response(generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})


ROUTES = (Route("GET", "/metrics", Access.MONITOR, None, metrics, Needs.NOTHING, is_quiet=True),)
