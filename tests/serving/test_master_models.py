"""A master over engines of two models: each request goes to the one that it names, and what is of the server is one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx

from serving.cluster.engine_gate import EngineGate
from serving.commands.master import Master
from serving.commands.server_life import front_door
from serving.master_config import MasterConfig
from tests.llm.conftest import SETTINGS
from tests.llm.gated import KEYS, WatchedLocal
from tests.llm.test_remote import until
from xllm.client.gate_wire import ServedModel
from xllm.config import EngineConfig
from xllm.engine.core import EngineCore
from xllm.setting_tree import build_tree

ADMIN = {"Authorization": "Bearer the-admins"}
MODELS = {"small": ("small", "tiny"), "large": ("large",)}
ROLE_OF = {"small": "DEFAULT", "large": "MIX"}
PROMPT = {"prompt": "def add(a, b):", "max_tokens": 4, "temperature": 0}


class Site:
    """A master, and the gates of its instances by the model that they serve."""

    def __init__(self, http: httpx.AsyncClient, gates: dict[str, EngineGate]):
        self.http, self.gates = http, gates

    async def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        return await self.http.post(path, json=body)

    async def shown(self) -> dict[str, Any]:
        return (await self.http.get("/cluster")).raise_for_status().json()


@contextlib.contextmanager
def unfiltered_logs() -> Iterator[None]:
    """What a server does to loggers of the process ends with it."""
    before = {name: list(logging.getLogger(name).filters) for name in ("asyncio", "uvicorn.error")}
    try:
        yield
    finally:
        for name, filters in before.items():
            logging.getLogger(name).filters[:] = filters


@contextlib.asynccontextmanager
async def site() -> AsyncIterator[Site]:
    engines = {name: WatchedLocal(EngineCore(EngineConfig.from_flat(**SETTINGS))) for name in MODELS}
    gates = {}
    for name, names in MODELS.items():
        gates[name] = EngineGate(engines[name], [engines[name]], KEYS, Path("/"), role=ROLE_OF[name])
        gates[name].listen("127.0.0.1:0")
        gates[name].open(ServedModel(names, f"fingerprint of {name}"))
    config = build_tree(MasterConfig, {"instances": ",".join(gate.address for gate in gates.values()), "port": 0,
                                       "admin_api_key": ("the-admins",)})
    with front_door(config.http) as door, unfiltered_logs():
        master = Master(config, door, KEYS, None)
        running = asyncio.create_task(master.run())
        async with httpx.AsyncClient(base_url=door.url, headers=ADMIN, timeout=20) as http:
            await until(lambda: hasattr(master, "_state"))
            await until(lambda: [one.loaded for one in master._state.states] == [True, True], 15)
            yield Site(http, gates)
        master._stop.set()
        assert await running == 0
    for name, engine in engines.items():
        gates[name].close()
        engine.shutdown()


async def test_the_model_that_is_named_answers() -> None:
    async with site() as found:
        await _who_answers(found)
        await _what_is_refused(found)
        await _what_is_shown(found)
        await _commands(found)
        await _one_model_is_gone(found)


async def _who_answers(found: Site) -> None:
    chat = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    calls = [("/v1/completions", PROMPT), ("/v1/chat/completions", chat), ("/v1/messages", chat),
             ("/v1/responses", {"input": "Hello", "max_output_tokens": 4}), ("/tokenize", {"prompt": "a"}),
             ("/v1/embeddings", {"input": "a"}), ("/v1/messages/count_tokens", {"messages": chat["messages"]})]
    before = {"tiny": 0, "large": 0}
    for path, body in calls:
        for name in before:
            answer = await found.post(path, {**body, "model": name})
            assert answer.status_code == 200, (path, answer.text)
            assert answer.json().get("model", name) == name
    for name in before:  # which TGI's clients can name as an adapter only
        body = {"inputs": PROMPT["prompt"], "parameters": {"max_new_tokens": 4, "adapter_id": name}}
        whole, streamed = await found.post("/generate", body), await found.post("/generate_stream", body)
        last = json.loads(streamed.text.removesuffix("\n\n").rpartition("data: ")[2])
        assert last["generated_text"] == whole.json()["generated_text"], (whole.text, streamed.text)
        assert (await found.http.get("/info", params={"model": name})).json()["model_id"] in ("small", "large")
    decided = [one["instance"] for one in (await found.shown())["decisions"]]
    counted = {name: decided.count(gate.address) for name, gate in found.gates.items()}
    assert counted == {"small": 7, "large": 7}, "of those that generate or embed"


async def _what_is_refused(found: Site) -> None:
    for path, body in (("/v1/completions", PROMPT), ("/v1/chat/completions", {"messages": []}),
                       ("/v1/responses", {"input": "a"}), ("/tokenize", {"prompt": "a"})):
        unknown = await found.post(path, {**body, "model": "other"})
        assert unknown.status_code == 404, (path, unknown.text)
        assert "the model 'other' does not exist; served here: " in unknown.text and "large" in unknown.text
        unnamed = await found.post(path, body)
        assert unnamed.status_code == 400 and "several models are served here" in unnamed.text, (path, unnamed.text)
    unnamed = await found.post("/generate", {"inputs": "a"})
    assert unnamed.status_code == 422 and "several models are served here" in unnamed.json()["error"]
    shaped = await found.post("/v1/messages", {"max_tokens": 2, "messages": [{"role": "user", "content": "a"}],
                                               "model": "other"})
    assert shaped.status_code == 404 and shaped.json()["error"]["type"] == "not_found_error"


async def _what_is_shown(found: Site) -> None:
    listed = (await found.http.get("/v1/models")).json()["data"]
    assert {one["id"] for one in listed} == {"small", "tiny", "large"}
    for one in listed:
        same = await found.http.get(f"/v1/models/{one['id']}")
        assert same.json() == one and one["root"] in MODELS
    assert (await found.http.get("/v1/models/other")).status_code == 404
    health = (await found.http.get("/health")).json()
    assert health["status"] == "ok" and {one["model"] for one in health["models"]} == set(MODELS)
    members = (await found.shown())["members"]
    assert {member["models"][0]: member["state"] for member in members} == dict.fromkeys(MODELS, "active")
    assert {member["models"][0]: member["role"] for member in members} == ROLE_OF, "as they say themselves"
    metrics = (await found.http.get("/metrics")).text
    labels = {family: re.findall(rf'^xllm:{family}{{.*model_name="(\w+)".*}} (\S+)$', metrics, re.MULTILINE)
              for family in ("request_success_total", "queue_tokens", "cluster_decisions_total", "cluster_members",
                             "connections_closed_total")}
    for name in MODELS:
        assert sum(float(value) for label, value in labels["request_success_total"] if label == name) >= 4
        assert sum(float(value) for label, value in labels["cluster_decisions_total"] if label == name) == 7
    assert sorted(label for label, _ in labels["queue_tokens"]) == sorted(MODELS)
    assert len({label for family in ("cluster_members", "connections_closed_total")
                for label, _ in labels[family]}) == 1
    assert sum(float(value) for _, value in labels["cluster_members"]) == 2, "of the server, so they are there once"
    for name in ("small", "large"):
        stats = (await found.http.get("/v1/stats", params={"model": name})).json()
        assert stats["server"]["model"] == name
    assert (await found.http.get("/v1/stats", params={"model": "other"})).status_code == 404
    info = await found.http.get("/tokenizer_info")
    assert info.status_code == 400 and (await found.http.get("/tokenizer_info?model=large")).status_code == 200


async def _commands(found: Site) -> None:
    assert (await found.http.post("/pause")).status_code == 400
    assert (await found.http.post("/pause?model=other")).status_code == 404
    assert (await found.http.post("/sleep?model=large&level=1")).json()["is_sleeping"]
    states = [(await found.http.get("/is_sleeping", params={"model": name})).json()["is_sleeping"] for name in MODELS]
    assert states == [False, True]
    assert (await found.post("/v1/completions", {**PROMPT, "model": "small"})).status_code == 200
    assert (await found.http.post("/wake_up?model=large")).status_code == 200


async def _one_model_is_gone(found: Site) -> None:
    found.gates["large"].close()

    async def code(name: str) -> int:
        return (await found.post("/v1/completions", {**PROMPT, "model": name})).status_code

    for _ in range(100):
        if await code("large") == 503:
            break
        await asyncio.sleep(0.05)
    assert (await code("large"), await code("small")) == (503, 200)
    health = await found.http.get("/health")
    assert health.status_code == 200 and health.json()["status"] == "degraded"
    assert "large: waiting: no instance takes requests" in health.json()["reason"]
    assert (await found.http.get("/ready")).status_code == 200
