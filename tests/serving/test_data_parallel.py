"""Two engines behind one server: who gets what, what all of them do, and what is lost when one dies."""

from __future__ import annotations

import concurrent.futures
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.adapters import write_adapter
from tests.serving.server_process import ServerProcess, wait_for
from xllm.client.replicas import open_engine
from xllm.config import DeviceSettings, EngineConfig
from xllm.engine_count import check_nodes
from xllm.errors import ConfigError
from xllm.llm import LLM
from xllm.node_settings import NodeSettings
from xllm.request import SamplingParams

ADMIN = {"Authorization": "Bearer an-admin-key-of-some-length"}
BODY = {"max_tokens": 4, "temperature": 0, "ignore_eos": True}
LONG = {"max_tokens": 400, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[ServerProcess]:
    for number in (1, 2):
        write_adapter(folder / "adapters" / f"x{number}", number)
    flags = ("-dp", "2", "--enable-lora", "--lora-folder", str(folder / "adapters"), "--admin-api-key",
             ADMIN["Authorization"].split()[1], "--num-threads", "1", "--engine-restarts", "4", "--host-cache-size",
             "4MiB", "--disk-cache-size", "16MiB", "--disk-cache-dir", str(folder / "kv"))
    with ServerProcess(folder / "log.txt", *flags) as running:
        yield running
        assert running.stop() == 0


def prompt(seed: int, num_tokens: int = 100) -> list[int]:
    return [(seed * 7919 + place * 31) % 900 + 20 for place in range(num_tokens)]


def complete(server: ServerProcess, token_ids: list[int], **extra: Any) -> dict[str, Any]:
    response = server.http.post("/v1/completions", json={**BODY, "prompt": token_ids, **extra})
    assert response.status_code == 200, response.text
    return response.json()


def cached(answer: dict[str, Any]) -> int:
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def by_engine(server: ServerProcess, name: str, labels: str = "") -> list[float]:
    return [server.value(f'{name}{{engine="{number}",{labels}model_name="demo"}}') for number in (0, 1)]


def admin(server: ServerProcess, path: str, **body: Any) -> httpx.Response:
    return server.http.post(path, json=body, headers=ADMIN)


def engine_pids(server: ServerProcess) -> list[int]:
    """In the order in which they were started."""
    found = [child for child in psutil.Process(server.process.pid).children()
             if "xllm.client.engine_process" in child.cmdline()]
    return [child.pid for child in sorted(found, key=psutil.Process.create_time)]


def test_calls_spread_and_come_back_to_what_is_cached(server: ServerProcess) -> None:
    """Alternating calls would find half of it."""
    before = by_engine(server, "xllm:prompt_tokens_total")
    texts = [complete(server, prompt(seed))["choices"][0]["text"] for seed in range(6)]
    spread = wait_spread(server, before)
    assert spread == [300, 300], "new prompts go to both in turn"
    again = [complete(server, prompt(seed)) for seed in (5, 3, 1, 0, 2, 4)]
    assert [cached(answer) for answer in again] == [96] * 6
    assert [answer["choices"][0]["text"] for answer in again] == [texts[seed] for seed in (5, 3, 1, 0, 2, 4)]
    salted = complete(server, prompt(5), cache_salt="another")
    assert cached(salted) == 0
    assert cached(complete(server, prompt(5), cache_salt="another")) == 96


def wait_spread(server: ServerProcess, before: list[float]) -> list[float]:
    def spread() -> list[float]:
        return [now - then for now, then in zip(by_engine(server, "xllm:prompt_tokens_total"), before)]

    wait_for(lambda: sum(spread()) >= 600, what="the engines' reports")
    return spread()


def test_at_once_they_share_the_work(server: ServerProcess) -> None:
    before = by_engine(server, "xllm:request_success_total", 'finished_reason="length",')
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda seed: complete(server, prompt(seed + 50, 60), max_tokens=30), range(8)))
    after = by_engine(server, "xllm:request_success_total", 'finished_reason="length",')
    assert [now - then for now, then in zip(after, before)] == [4, 4]


def test_every_engine_has_its_own_figures(server: ServerProcess) -> None:
    wait_for(lambda: by_engine(server, "xllm:num_requests_running") == [0, 0], what="idleness")
    text = server.metrics()
    names = re.findall(r"^# TYPE (\S+)", text, re.MULTILINE)
    assert len(names) == len(set(names)), "a family is there once"
    assert by_engine(server, "vllm:engine_up") == by_engine(server, "xllm:engine_up") == [1, 1]
    assert by_engine(server, "xllm:num_kv_blocks") == [1024, 1024]
    assert min(by_engine(server, "xllm:time_to_first_token_seconds_count")) > 0
    assert 'xllm:queue_tokens{engine="1"' not in text, "the server's own figures are there once"
    snapshot = server.http.get("/v1/stats").json()
    assert [one["num_requests_running"] for one in snapshot["engines"]] == [0, 0]
    assert snapshot["engine"]["num_kv_blocks"] == 2048
    assert {request["engine"] for request in snapshot["requests"]} == {0, 1}
    assert (Path(server._log).parent / "kv" / "engine-0").is_dir()


def test_commands_reach_all_of_them(server: ServerProcess) -> None:
    assert complete(server, prompt(200)) and complete(server, prompt(201))
    assert admin(server, "/reset_prefix_cache").json()["num_blocks"] >= 12
    assert admin(server, "/pause").json()["is_paused"]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        held = [pool.submit(complete, server, prompt(seed)) for seed in (202, 203)]
        wait_for(lambda: by_engine(server, "xllm:num_requests_waiting") == [1, 1], what="a call held in each")
        assert not admin(server, "/resume").json()["is_paused"]
        assert all(call.result(20) for call in held)
    refused = admin(server, "/sleep")
    assert refused.status_code == 409 and "engine 0: an engine with KV tiers cannot sleep" in refused.text
    assert not server.http.get("/is_sleeping", headers=ADMIN).json()["is_sleeping"]


def test_adapters_are_loaded_by_all_or_none(server: ServerProcess) -> None:
    assert admin(server, "/v1/load_lora_adapter", lora_name="x", lora_path="x1").status_code == 200
    answers = [complete(server, prompt(seed), model="x") for seed in (1, 2, 3, 4)]
    assert [cached(complete(server, prompt(seed), model="x")) for seed in (4, 2, 1, 3)] == [96] * 4
    assert all(answers) and admin(server, "/v1/load_lora_adapter", lora_name="x", lora_path="x2").status_code == 400
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert admin(server, "/pause").json()["is_paused"]
        held = pool.submit(complete, server, prompt(9), model="x")
        wait_for(lambda: sum(by_engine(server, "xllm:num_requests_waiting")) == 1, what="a request with it")
        refused = admin(server, "/v1/unload_lora_adapter", lora_name="x")
        assert refused.status_code == 409 and re.search("engine [01]: requests with adapter 'x' are open", refused.text)
        assert "x" in {model["id"] for model in server.http.get("/v1/models").json()["data"]}, "no engine has lost it"
        admin(server, "/resume")
        assert held.result(30)
    assert complete(server, prompt(1), model="x")["choices"] == answers[0]["choices"]


def test_one_dies_and_the_other_serves_on(server: ServerProcess) -> None:
    """It has the adapter, and is paused with the other, when it is back."""
    pids = engine_pids(server)
    assert admin(server, "/pause").json()["is_paused"]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(server.http.post, "/v1/completions", json={**LONG, "prompt": prompt(300 + n)})
                 for n in range(4)]
        wait_for(lambda: by_engine(server, "xllm:num_requests_waiting") == [2, 2], what="calls in both")
        admin(server, "/resume")  # so that they have just begun as one dies
        os.kill(pids[1], signal.SIGKILL)
        answers = [call.result(60) for call in calls]
    assert sorted(answer.status_code for answer in answers) == [200, 200, 503, 503]
    assert all("signal 9" in answer.text for answer in answers if answer.status_code == 503)
    health = server.health()
    assert health.status_code == 200 and server.http.get("/ready").status_code == 200
    if health.json()["status"] != "ok":  # else it was quick
        assert health.json()["status"] == "degraded" and health.json()["engines"][0]["status"] == "ok"
        assert "engine 1: " in health.json()["reason"] and "signal 9" in health.json()["reason"]
    before = complete(server, prompt(1), model="x")
    assert admin(server, "/pause").json()["is_paused"]
    wait_for(lambda: server.health().json()["status"] == "ok", 60.0, "a restart")
    assert engine_pids(server)[0] == pids[0] and engine_pids(server)[1] != pids[1]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(complete, server, prompt(400 + n), model="x") for n in range(4)]
        wait_for(lambda: by_engine(server, "xllm:num_requests_waiting") == [2, 2], what="calls held in both")
        admin(server, "/resume")
        assert all(call.result(30) for call in calls)
    assert complete(server, prompt(1), model="x")["choices"] == before["choices"]
    assert by_engine(server, "xllm:engine_restarts_total") == [0, 1]


@pytest.mark.parametrize("size", [0, 65])
def test_numbers_that_are_refused(size: int) -> None:
    with pytest.raises(ConfigError, match="data_parallel_size must be at "):
        open_engine(EngineConfig.from_flat(data_parallel_size=size), lambda name, share, seconds: None)


def test_engines_of_several_machines_each_are_refused() -> None:
    nodes = NodeSettings(nnodes=2, node_rank=0, master_addr="10.0.0.1")
    with pytest.raises(ConfigError, match="data_parallel_size 2 with nnodes 2: the engines of one server are on one"):
        check_nodes(DeviceSettings(data_parallel_size=2, tensor_parallel_size=2), nodes)


@pytest.mark.parametrize("flag", ["data_parallel_rank", "data_parallel_start_rank", "data_parallel_address",
                                  "data_parallel_rpc_port", "data_parallel_size_local", "data_parallel_external_lb",
                                  "data_parallel_hybrid_lb"])
def test_engines_that_somebody_else_starts_are_refused(flag: str) -> None:
    with pytest.raises(ConfigError, match=f"{flag} is not supported: a server starts all of its engines"):
        EngineConfig.from_flat(**{flag: "true"})
    assert EngineConfig.from_flat(dp_size=2) == EngineConfig.from_flat(data_parallel_size=2)


def test_python_has_one_engine() -> None:
    with pytest.raises(ConfigError, match="data_parallel_size 2: several engines are started by `xllm serve` only"):
        LLM(data_parallel_size=2)


def test_each_engine_may_have_two_ranks(tmp_path: Path) -> None:
    with LLM() as llm:
        expected = llm.generate([prompt(1), prompt(2)], SamplingParams(**BODY), use_tqdm=False)
    with ServerProcess(tmp_path / "log.txt", "-dp", "2", "-tp", "2") as server:
        answers = [complete(server, prompt(seed), return_token_ids=True) for seed in (1, 2)]
        assert [a["choices"][0]["token_ids"] for a in answers] == [list(e.outputs[0].token_ids) for e in expected]
        assert by_engine(server, "xllm:prompt_tokens_total") == [100, 100]
        processes = [child.cmdline() for child in psutil.Process(server.process.pid).children(recursive=True)]
        assert sum("xllm.worker.rank" in words for words in processes) == 4
        assert server.stop() == 0
