"""One trace through a master and its instances, as collectors of both get it; in one process, over real gates."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest

from serving.api.app import create_app
from serving.api.cluster_view import ClusterView
from serving.api.state import ServerState
from serving.commands.gated_calls import GatedCalls
from serving.config import ServerConfig
from serving.observe.call_log import CallLog
from serving.observe.instance_spans import InstanceSpans
from serving.observe.tracing import Tracer
from tests.llm.cluster_sites import CONFIG, SHORT, Cluster, after, make_request, three_sites
from tests.llm.gated import WatchedLocal, gated_client
from tests.llm.test_clients import read
from tests.llm.test_remote import until
from tests.serving.test_tracing import SPAN_ID, TRACE_ID, Collector, attributes
from xllm.client.cluster import ClusterClient
from xllm.engine.core import EngineCore
from xllm.request import SamplingParams

NUM_TOKENS = 60
BODY = {"prompt": list(SHORT), "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}


class Traced:
    """A process that traces, and what its collector has."""

    def __init__(self) -> None:
        self.collector = Collector()
        self.tracer = Tracer(f"http://127.0.0.1:{self.collector.server_port}/v1/traces")
        self.tracer.model = "demo"

    async def spans(self, name: str) -> list[Any]:
        """Those of that name, in the order of their beginnings."""
        await asyncio.to_thread(self.tracer._provider.force_flush)
        return sorted((span for span in self.collector.spans if span.name == name),
                      key=lambda span: span.start_time_unix_nano)

    def close(self) -> None:
        self.tracer.shutdown()
        self.collector.shutdown()
        self.collector.server_close()


@pytest.fixture
def master() -> Iterator[Traced]:
    traced = Traced()
    yield traced
    assert not traced.tracer._begun, "whatever becomes of a request, its span ends"
    traced.close()


@pytest.fixture
def instances() -> Iterator[Traced]:
    traced = Traced()
    yield traced
    traced.close()


@pytest.fixture
async def cluster(master: Traced, instances: Traced) -> AsyncIterator[Cluster]:
    watcher = InstanceSpans(master.tracer)
    async with three_sites(watcher=watcher) as found:
        for site in found.sites.values():
            site.client.gate.on_call_end = GatedCalls(instances.tracer, log_requests=True).note
        yield found
        assert not watcher._tries


async def _nobody() -> None:
    return None


def api_of(client: ClusterClient, tracer: Tracer) -> httpx.AsyncClient:
    """The master's HTTP API."""
    state = ServerState(client, ServerConfig(), tracer=tracer, model_name="demo")
    state.cluster = ClusterView(engine=client, engines=lambda: [client], policy="CAR", members=list, address="",
                                store=lambda: None, leader=_nobody)
    state.loaded = True
    app = CallLog(create_app(state), log_requests=True)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1")


async def test_a_request_that_went_on_elsewhere_is_one_trace(
        cluster: Cluster, master: Traced, instances: Traced, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "xllm.request")
    async with api_of(cluster.client, master.tracer) as http:
        asking = asyncio.create_task(http.post("/v1/completions", json=BODY, headers={
            "traceparent": f"00-{TRACE_ID}-{SPAN_ID}-01", "x-request-id": "order-4711"}))
        await until(lambda: cluster.client.request_ids)
        (call,) = cluster.client._dispatcher.calls.values()
        first = cluster.having(call)
        after(call, 5, first.kill)
        answer = await asyncio.wait_for(asking, 30)
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == NUM_TOKENS

    (root,) = await master.spans("llm_request")
    tries, served = await master.spans("instance"), await instances.spans("llm_request")
    assert {span.trace_id.hex() for span in (root, *tries, *served)} == {TRACE_ID}
    assert root.parent_span_id.hex() == SPAN_ID
    assert [span.parent_span_id for span in tries] == [root.span_id] * 2
    assert [span.parent_span_id for span in served] == [span.span_id for span in tries]
    assert {span.name for span in master.collector.spans} == {"llm_request", "queue", "prefill", "decode", "instance"}

    lost, last = map(attributes, tries)
    assert (lost["xllm.instance.name"], lost["xllm.instance.try"]) == (first.name, 1)
    assert (lost["xllm.instance.outcome"], tries[0].status.code) == ("lost", tries[0].status.STATUS_CODE_ERROR)
    assert "it was hit" in tries[0].status.message
    assert last["xllm.instance.name"] != first.name and last["xllm.instance.try"] == 2
    assert last["xllm.instance.after"] == "lost" and "xllm.instance.outcome" not in last
    assert lost["xllm.instance.reason"] and last["xllm.instance.reason"]
    assert tries[1].status.code == tries[1].status.STATUS_CODE_UNSET

    (before, behind), whole = map(attributes, served), attributes(root)
    assert before["gen_ai.request.id"] == behind["gen_ai.request.id"] == whole["gen_ai.request.id"]
    assert before["gen_ai.response.finish_reasons"] == ["error"] and served[0].status.code == 2
    assert behind["gen_ai.response.finish_reasons"] == ["length"] == whole["gen_ai.response.finish_reasons"]
    passed_on = NUM_TOKENS - behind["gen_ai.usage.output_tokens"]
    assert behind["gen_ai.usage.input_tokens"] == len(SHORT) + passed_on
    assert 5 <= passed_on <= before["gen_ai.usage.output_tokens"]
    for span in served:
        phases = {one.name for one in instances.collector.spans if one.parent_span_id == span.span_id}
        assert phases == {"queue", "prefill", "decode"}
    for inner, outer in ((tries[0], root), (tries[1], root), (served[1], tries[1])):
        assert inner.start_time_unix_nano >= outer.start_time_unix_nano - 1_000_000
    assert tries[0].end_time_unix_nano <= tries[1].start_time_unix_nano

    lines = [record for record in caplog.records if record.name == "xllm.request"]
    assert all("order-4711" in record.fields["request_id"] for record in lines)  # type: ignore[attr-defined]
    assert [record.getMessage() for record in lines] == ["cluster failed", "cluster finished",
                                                         "POST /v1/completions 200 finished"]
    assert [record.fields["generated_tokens"] for record in lines[1:]] == [  # type: ignore[attr-defined]
        NUM_TOKENS - passed_on, NUM_TOKENS]


async def test_other_ends_of_a_try(cluster: Cluster, master: Traced) -> None:
    """An instance that drains; instances that have no room for a call, which is refused then."""
    async with api_of(cluster.client, master.tracer) as http:
        asking = asyncio.create_task(http.post("/v1/completions", json={**BODY, "n": 2}))
        await until(lambda: cluster.client.request_ids)
        call = next(iter(cluster.client._dispatcher.calls.values()))
        after(call, 5, cluster.having(call).client.gate.drain)
        assert (await asyncio.wait_for(asking, 30)).status_code == 200
        tries = await master.spans("instance")
        assert len(tries) == 4 and len({span.parent_span_id for span in tries}) == 2, "of each choice"
        assert sorted(str(attributes(span).get("xllm.instance.outcome")) for span in tries) == [
            "None", "None", "drained", "drained"]
        assert {span.status.code for span in tries} == {0}

        master.collector.spans.clear()
        full = await http.post("/v1/completions", json={**BODY, "n": 13})
        assert full.status_code == 503, full.text
    roots, tries = await master.spans("llm_request"), await master.spans("instance")
    assert [attributes(span)["gen_ai.response.finish_reasons"] for span in roots] == [["error"]] * 13
    assert len(tries) == 26 and {attributes(span)["xllm.instance.outcome"] for span in tries} == {"busy"}


async def test_an_instance_has_traces_of_its_own_where_it_gets_no_context(instances: Traced) -> None:
    engine = WatchedLocal(EngineCore(CONFIG))
    async with gated_client(engine) as client:
        client.gate.on_call_end = GatedCalls(instances.tracer, log_requests=False).note
        await read(client.submit([make_request("a")]))
        await read(client.submit([make_request("b", traceparent="00-no context")]))
        leaver = client.submit([make_request("c", SamplingParams(max_tokens=400, ignore_eos=True))])
        await leaver.next()
        client.close()
        await until(lambda: not client.gate._sessions)
    spans = {attributes(span)["gen_ai.request.id"]: span for span in await instances.spans("llm_request")}
    assert set(spans) == {"a", "b", "c"} and {span.parent_span_id for span in spans.values()} == {b""}
    assert len({span.trace_id for span in spans.values()}) == 3
    assert attributes(spans["c"])["gen_ai.response.finish_reasons"] == ["abort"]
    engine.shutdown()
