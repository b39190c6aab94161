"""`xllm master` over servers of OpenAI's API: two `xllm serve` processes, which speak it as `vllm serve` does."""

from __future__ import annotations

import concurrent.futures
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving.server_process import ROOT, ServerProcess, wait_for
from tests.serving.test_master import ADMIN, Master, free_ports, text_of

KEY = "the-key-of-the-servers"
GREEDY = {"prompt": "def quicksort(items):", "max_tokens": 300, "temperature": 0, "ignore_eos": True, "stream": True,
          "stream_options": {"include_usage": True}}


class Servers:
    """a wants a key, b publishes KV events (of callers with keys it would not); and a master that knows their URLs."""

    def __init__(self, folder: Path):
        events, replay = (f"tcp://127.0.0.1:{port}" for port in free_ports(2))
        (folder / "key").write_text(KEY + "\n")
        (folder / "key").chmod(0o600)
        flags = {"a": ["--api-key", KEY], "b": ["--kv-events-token-ids", "--kv-events-config", json.dumps({
            "enable_kv_cache_events": True, "endpoint": events, "replay_endpoint": replay})]}
        with concurrent.futures.ThreadPoolExecutor() as pool:
            self.servers = dict(zip(flags, pool.map(
                lambda name: ServerProcess(folder / f"{name}.log", *flags[name], key=KEY), flags), strict=True))
        self.master = Master(
            folder, [], "--openai-server", f"a={self.servers['a'].url}/v1,api-key-file={folder / 'key'}",
            "--openai-server", f"b={self.servers['b'].url},events={events},replay={replay}",
            "--tokenizer-path", str(ROOT / "xllm" / "bundled"))

    def stop(self) -> None:
        self.master.http.close()
        assert self.master.stop() == 0, self.master.log
        for server in self.servers.values():
            server.http.close()
            server.stop()


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    servers = Servers(tmp_path_factory.mktemp("openai"))
    try:
        wait_for(lambda: {one["state"] for one in servers.master.cluster()["members"]} == {"active"}, what="both")
        wait_for(lambda: servers.master.http.get("/health").status_code == 200, what="the tokenizer")
        yield servers
    finally:
        servers.stop()


def test_a_completion_is_that_of_the_server(servers: Servers) -> None:
    """Text, token ids, log-probabilities, usage, stop strings and ends: as the server itself answers."""
    body = {"prompt": "import numpy as", "max_tokens": 24, "temperature": 0, "logprobs": 3, "return_token_ids": True,
            "stop": ["zzz"], "min_tokens": 2}
    direct = servers.servers["a"].http.post("/v1/completions", json=body).json()["choices"][0]
    through = servers.master.http.post("/v1/completions", json=body).json()
    assert through["choices"][0] == direct, through
    stop = direct["text"][5:8]
    cut = servers.master.http.post("/v1/completions", json={**body, "stop": [stop]}).json()["choices"][0]
    assert (cut["finish_reason"], cut["stop_reason"]) == ("stop", stop)
    assert cut["text"] == direct["text"].partition(stop)[0]


def test_several_sequences_and_a_seed(servers: Servers) -> None:
    body = {"prompt": ["a = 1", "b = "], "n": 2, "max_tokens": 8, "temperature": 0.9, "seed": 5, "ignore_eos": True}
    direct = servers.servers["a"].http.post("/v1/completions", json=body).json()
    through = servers.master.http.post("/v1/completions", json=body).json()
    assert [one["text"] for one in through["choices"]] == [one["text"] for one in direct["choices"]]
    assert through["usage"]["completion_tokens"] == 32


def test_chats_with_tools_and_forms(servers: Servers) -> None:
    chat = {"messages": [{"role": "user", "content": "What is the weather in Oslo?"}], "max_tokens": 60,
            "temperature": 0, "tools": [{"type": "function", "function": {"name": "weather", "parameters": {
                "type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"],
                "additionalProperties": False}}}], "tool_choice": "required"}
    answer = servers.master.http.post("/v1/chat/completions", json=chat).raise_for_status().json()
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"])["city"] in ("Oslo", "Rome")
    form = {"prompt": "answer: ", "max_tokens": 30, "structured_outputs": {"choice": ["yes", "no"]}}
    assert servers.master.http.post("/v1/completions", json=form).json()["choices"][0]["text"] in ("yes", "no")


@pytest.mark.parametrize(("field", "value"), [("prompt_logprobs", 1), ("offline", True), ("ttlt_slo_ms", 1000.0)])
def test_what_the_api_cannot_say_is_refused_by_name(servers: Servers, field: str, value: object) -> None:
    refused = servers.master.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 4, field: value})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == field
    assert "OpenAI servers (--openai-server) do not take" in refused.json()["error"]["message"]


def test_what_they_do_not_do(servers: Servers) -> None:
    embedding = servers.master.http.post("/v1/embeddings", json={"input": "a"})
    assert embedding.status_code == 400 and "embeddings" in embedding.json()["error"]["message"]
    paused = servers.master.http.post("/pause", json={"mode": "keep"}, headers=ADMIN)
    assert paused.status_code >= 400 and "takes no commands" in paused.text
    assert servers.master.http.get("/health").json()["status"] == "ok"


def test_what_it_shows(servers: Servers) -> None:
    shown = servers.master.cluster()
    for member, server in zip(shown["members"], servers.servers.values(), strict=True):
        assert member["address"] == server.url and member["models"] == ["demo"]
        assert member["reason"] == "its model is known by name, its fingerprint is not checked"
        assert (member["block_size"], member["kv_blocks"]) == (16, 1024)
    assert KEY not in json.dumps(shown) and KEY not in servers.master.log


def test_who_goes_away_is_aborted_there(servers: Servers) -> None:
    with servers.master.http.stream("POST", "/v1/completions", json={**GREEDY, "max_tokens": 480}) as answer:
        assert answer.status_code == 200, answer.read()
        lines = answer.iter_lines()
        next(lines)
        place = servers.master.place()
        assert place is not None, "it is under way"
        assert servers.servers[place].gauge("xllm:num_requests_running") == 1
    gone_s = wait_for(lambda: servers.servers[place].gauge("xllm:num_requests_running") == 0, what="the abort")
    assert gone_s < 1.0
    wait_for(lambda: servers.master.place() is None)
    servers.servers[place].wait_idle()


def test_a_prefix_is_found_by_events(servers: Servers) -> None:
    """What a client computed at b directly, past the master, is found there."""
    prompt = "".join(f"value_{number} = {number * 7}\n" for number in range(25))
    servers.servers["b"].http.post("/v1/completions", json={"prompt": prompt, "max_tokens": 2}).raise_for_status()

    def is_told() -> bool:
        return next(one for one in servers.master.cluster()["members"] if one["name"] == "b")["cached_blocks"] >= 10

    wait_for(is_told, what="the events")
    for number in range(3):
        body = {"prompt": prompt + f"# {number}", "max_tokens": 2}
        answer = servers.master.http.post("/v1/completions", json=body).json()
        decision = servers.master.cluster()["decisions"][0]
        assert (decision["instance"], decision["reason"]) == ("b", "prefix"), decision
        cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert cached >= 160 and abs(decision["cached_tokens"] - cached) <= 16


def test_one_is_killed(servers: Servers) -> None:
    """The last test: its answer goes on at the other one."""
    expected, usage = text_of(servers.master, GREEDY)
    killed = []

    def kill() -> None:
        place = servers.master.place()
        assert place is not None, "it is under way"
        os.kill(servers.servers[place].process.pid, signal.SIGKILL)
        killed.append(place)

    started_s = time.monotonic()
    text, found = text_of(servers.master, GREEDY, 20, kill)
    assert text == expected and len(killed) == 1 and time.monotonic() - started_s < 30
    assert found["completion_tokens"] == usage["completion_tokens"] == 300
    assert servers.master.metric("cluster_recoveries_total") == 1.0
    (lost,) = killed
    wait_for(lambda: {one["name"]: one["state"] for one in servers.master.cluster()["members"]}[lost] == "suspect")
    assert f"instance {lost} has left: " in servers.master.log
