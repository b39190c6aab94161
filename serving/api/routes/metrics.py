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
from serving.api.overload_families import life_families, queue_families, server_families
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
        for prefix in PREFIXES:
            yield from joined(part for state in self._state.states for part in self._of_model(prefix, state))

    def _of_model(self, prefix: str, state: ServerState) -> Iterator[Iterator[Metric]]:
        """In parts. What is one for all engines stands under the first, where whoever picks engines finds it; what is
        one for all models under the first model."""
        name = state.served_names[0] if state.engine.facts else ""
        makes = [Families(prefix, (name, str(number))) for number in range(len(state.engine.engines))]
        for number, make in enumerate(makes):
            yield self._of_engine(make, state, number)
        yield self._of_engines(makes[0], state)
        if state is self._state:
            yield self._of_server(makes[0])

    @staticmethod
    def _of_engine(make: Families, state: ServerState, number: int) -> Iterator[Metric]:
        yield from engine_families(make, state.engine.engines[number])
        yield from life_families(make, state, number)
        yield from state.metrics[number].families(make)

    def _of_engines(self, make: Families, state: ServerState) -> Iterator[Metric]:
        yield from queue_families(make, state)
        if state.cluster is not None:
            members = Counter(member.state for member in state.cluster.members()) if state is self._state else {}
            yield from cluster_families(make, state.cluster.engine.counts, state.cluster.engine.flips, members)
        if (facts := state.engine.facts) is not None:
            records = [one for one in state.requests.open_records() if one.model in ("", state.served_names[0])]
            yield from lora_families(make, facts.config.lora, records)

    def _of_server(self, make: Families) -> Iterator[Metric]:
        state = self._state
        yield from server_families(make, state)
        yield from state.refusals.families(make, state.keys.kinds)


async def metrics(state: ServerState, request: Request) -> Response:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(ServerCollector(state))  # type: ignore[arg-type]
    return Response(generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})


ROUTES = (Route("GET", "/metrics", Access.MONITOR, None, metrics, Needs.NOTHING, is_quiet=True),)
