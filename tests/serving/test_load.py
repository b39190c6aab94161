"""Many clients at once, and clients that leave: nothing may stay behind in the engine."""

from __future__ import annotations

import asyncio
import json
import random
import socket

import httpx
import openai
import pytest

from tests.serving.server_process import ServerProcess, wait_for

LONG = {"prompt": "def main():", "max_tokens": 480, "ignore_eos": True, "temperature": 1.0}


async def _one_client(client: openai.AsyncOpenAI, index: int, rng: random.Random) -> str:
    """Run one request to its end, or leave in the middle of it; says which."""
    prompt = f"request {index} " * rng.randint(1, 12)
    leaves_after = rng.choice([None, 0, 1, 3])
    if leaves_after is None:
        answer = await client.completions.create(model="demo", prompt=prompt, max_tokens=rng.randint(1, 8))
        assert answer.usage.completion_tokens >= 1
        return "finished"
    if leaves_after == 0:  # before anything has come
        task = asyncio.ensure_future(client.completions.create(model="demo", prompt=prompt, max_tokens=200))
        await asyncio.sleep(rng.random() * 0.5)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return "left"
    num_chunks = 0
    async with await client.completions.create(model="demo", prompt=prompt, max_tokens=200, stream=True) as stream:
        async for _ in stream:
            num_chunks += 1
            if num_chunks >= leaves_after:
                break
    return "left"


async def test_two_hundred_clients_with_aborts_leave_nothing(server: ServerProcess) -> None:
    rng = random.Random(0)
    async with server.async_client() as client:
        ends = await asyncio.gather(*(_one_client(client, index, random.Random(rng.random())) for index in range(200)))
    assert ends.count("finished") > 20
    assert ends.count("left") > 100
    server.wait_idle()
    assert server.http.get("/load").json() == {"server_load": 0}
    assert server.health().status_code == 200
    assert "Traceback" not in server.log


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_disconnect_aborts(server: ServerProcess, stream: bool) -> None:
    server.wait_idle()
    aborted = 'xllm:request_success_total{engine="0",finished_reason="abort",model_name="demo"}'
    body = json.dumps({**LONG, "stream": stream, "n": 32}).encode()  # that many last for seconds
    with socket.create_connection(("127.0.0.1", httpx.URL(server.url).port)) as connection:
        before = server.value(aborted)
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                           b"Content-Length: %d\r\n\r\n" % len(body) + body)
        wait_for(lambda: server.gauge("xllm:num_requests_running") == 32, what="the start")
    wait_for(lambda: server.value(aborted) == before + 32, what="the aborts")
    server.wait_idle(5.0)


def test_latencies_are_measured(server: ServerProcess) -> None:
    def counts() -> list[float]:
        return [server.gauge(f"{prefix}:{name}") for prefix in ("xllm", "vllm") for name in (
            "time_to_first_token_seconds_count", "inter_token_latency_seconds_count",
            "e2e_request_latency_seconds_count", "generation_tokens_total", "engine_steps_total")]

    before = counts()
    server.http.post("/v1/completions", json={**LONG, "max_tokens": 5})
    wait_for(lambda: server.gauge("xllm:generation_tokens_total") >= before[3] + 5, what="fresh stats")
    grown = [late - early for early, late in zip(before, counts(), strict=True)]
    assert grown[:4] == [1, 4, 1, 5]
    assert grown[4] >= 5
    assert grown[:4] == grown[5:9], "the vllm: aliases say the same"


def test_vllms_metric_names_are_there(server: ServerProcess) -> None:
    server.http.post("/v1/completions", json={**LONG, "max_tokens": 2})
    text = server.http.get("/metrics").text
    gauges = ["num_requests_running", "num_requests_waiting", 'num_requests_waiting_by_reason{engine="0",model_name='
              '"demo",reason="capacity"}', "kv_cache_usage_perc", "gpu_cache_usage_perc", "cache_config_info"]
    counters = ["prompt_tokens", "prompt_tokens_cached", "generation_tokens", "request_success", "num_preemptions",
                "prefix_cache_queries", "prefix_cache_hits", "admission_rejections"]
    histograms = ["time_to_first_token_seconds", "inter_token_latency_seconds", "time_per_output_token_seconds",
                  "request_time_per_output_token_seconds", "e2e_request_latency_seconds",
                  "request_decode_time_seconds", "request_prompt_tokens", "request_generation_tokens",
                  "request_max_num_generation_tokens", "request_params_n", "request_params_max_tokens",
                  "request_num_preemptions"]
    names = [*gauges, *(f"{name}_total" for name in counters), *(f"{name}_bucket" for name in histograms)]
    wanted = [f"{prefix}:{name}" for prefix in ("xllm", "vllm") for name in names]
    assert [name for name in wanted if f"\n{name}" not in text] == []
