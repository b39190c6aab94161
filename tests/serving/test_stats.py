"""`/v1/stats`: what the live views are made of, from a real server under load."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serving.observe.engine_history import MAX_STEPS, EngineHistory
from tests.serving.server_process import ServerProcess, wait_for
from xllm.engine.step_log import MAX_STEPS_A_BEAT, STEP_TIME_S, StepLog, StepReport


def snapshots(server: ServerProcess, **query: object) -> Iterator[dict[str, Any]]:
    with server.http.stream("GET", "/v1/stats/stream", params=query) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        for line in response.iter_lines():
            if line.startswith("data: {"):
                yield json.loads(line[6:])


def latest(server: ServerProcess) -> dict[str, Any]:
    return server.http.get("/v1/stats").json()


def test_a_request_from_the_queue_to_its_end(server: ServerProcess) -> None:
    server.wait_idle()
    body = {"prompt": "def f(x):", "max_tokens": 30, "ignore_eos": True, "request_id": "mine"}
    answer = server.http.post("/v1/completions", json=body).json()
    seen = latest(server)["requests"][0]
    assert seen["arrival_s"] <= seen["scheduled_s"] <= seen["first_token_s"] <= seen["end_s"]
    assert (seen["kind"], seen["finish_reason"]) == ("completion", "length")
    assert seen["num_prompt_tokens"] == answer["usage"]["prompt_tokens"]
    assert (seen["num_generation_tokens"], seen["max_tokens"]) == (30, 30)
    assert "mine" not in json.dumps(latest(server)) and "def f" not in json.dumps(latest(server))


def test_numbers_agree_with_metrics(server: ServerProcess) -> None:
    server.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 5, "ignore_eos": True})
    server.wait_idle()
    engine = latest(server)["engine"]
    for name in ("num_requests_running", "num_kv_blocks", "num_free_kv_blocks", "kv_cache_usage_perc"):
        assert engine[name] == server.gauge(f"xllm:{name}")
    for name in ("generation_tokens", "prompt_tokens", "engine_steps", "prefix_cache_queries", "num_preemptions"):
        assert engine[name] == server.gauge(f"xllm:{name}_total")
    steps = server.gauge("xllm:engine_step_duration_seconds_count")
    assert steps == server.gauge("xllm:iteration_tokens_total_count") == engine["engine_steps"]
    whole = server.gauge("xllm:request_inference_time_seconds_sum")
    parts = [server.gauge(f"xllm:request_{phase}_time_seconds_sum") for phase in ("prefill", "decode")]
    assert sum(parts) == pytest.approx(whole, rel=0.01)


def test_the_stream_follows_a_load(server: ServerProcess) -> None:
    load = threading.Thread(target=server.http.post, args=("/v1/completions",), kwargs={"json": {
        "prompt": [f"def number_{i}(x):" for i in range(3)], "max_tokens": 300, "ignore_eos": True}})
    steps, running, rows, states = [], [], [], set()
    for index, stats in enumerate(snapshots(server, interval_ms=100)):
        if index == 0:
            load.start()
        steps += stats["steps"]["rows"]
        rows += stats["history"]["rows"]
        running.append(stats["engine"]["num_requests_running"])
        states |= {(r["scheduled_s"] is None, r["first_token_s"] is None, r["end_s"] is None)
                   for r in stats["requests"][:3]}
        if index > 5 and not load.is_alive() and stats["engine"]["num_requests_running"] == 0:
            break
        assert index < 300
    load.join()
    assert max(running) == 3
    assert (False, False, True) in states  # seen while it decoded
    times = [row[0] for row in rows]
    assert times == sorted(set(times))  # each row once
    assert all(0 < seconds < 60 and tokens > 0 for _, seconds, tokens, _ in steps)
    decoding = [tokens for _, _, tokens, num_seqs in steps if tokens <= num_seqs]
    assert 250 <= len(decoding) < len(steps)  # all but those that computed the prompts
    ends = [step[0] for step in steps]
    assert ends == sorted(ends)


def test_an_abandoned_request_ends_as_abort(server: ServerProcess) -> None:
    with server.http.stream("POST", "/v1/completions", json={"prompt": "a", "max_tokens": 450, "stream": True,
                                                             "ignore_eos": True}) as response:
        next(response.iter_lines())
    wait_for(lambda: latest(server)["requests"][0]["finish_reason"] == "abort", what="the abort")


@pytest.mark.parametrize("value", ["0", "99", "-500", "nan", "1e3", "60001", "9" * 400, "", "500ms"])
def test_the_interval_has_bounds(server: ServerProcess, value: str) -> None:
    response = server.http.get("/v1/stats/stream", params={"interval_ms": value})
    assert response.status_code == 400 and response.json()["error"]["param"] == "interval_ms"


def check_what_a_server_with_keys_shows(server: ServerProcess) -> None:
    """Its page, and nothing else."""
    nobody = {"Authorization": ""}
    for path, status in (("/", 200), ("/web/app.js", 200), ("/v1/stats", 401), ("/v1/stats/stream", 401)):
        assert server.http.get(path, headers=nobody).status_code == status
    assert latest(server)["server"]["model"] == "demo"


def test_only_so_many_watch_a_server_with_keys_and_they_do_not_hold_up_the_end(tmp_path: Path) -> None:
    with ServerProcess(tmp_path / "log.txt", "--api-key", "k1", key="k1") as server:
        check_what_a_server_with_keys_shows(server)
        streams = [snapshots(server, interval_ms=60_000) for _ in range(32)]
        for stream in streams:
            next(stream)
        refused = server.http.get("/v1/stats/stream")
        assert refused.status_code == 429 and "Retry-After" in refused.headers
        streams.pop().close()
        wait_for(lambda: server.http.get("/v1/stats").status_code == 200)
        wait_for(lambda: _admitted(server), what="a free place")
        started_s = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - started_s < 4.0


def _admitted(server: ServerProcess) -> bool:
    with server.http.stream("GET", "/v1/stats/stream") as response:
        return response.status_code == 200


def test_step_log() -> None:
    log = StepLog()
    for step in range(MAX_STEPS_A_BEAT + 10):
        log.note(float(step), 0.004, 7, 3)
    report = log.take()
    assert len(report.recent) == MAX_STEPS_A_BEAT and report.recent[-1] == (MAX_STEPS_A_BEAT + 9.0, 0.004, 7, 3)
    assert sum(report.time_s.counts) == sum(report.tokens.counts) == MAX_STEPS_A_BEAT + 10
    assert report.time_s.counts[STEP_TIME_S.index(0.005)] == MAX_STEPS_A_BEAT + 10
    assert report.tokens.sum == 7 * (MAX_STEPS_A_BEAT + 10)
    assert log.take().recent == [] and sum(log.take().tokens.counts) == MAX_STEPS_A_BEAT + 10


def test_history_gives_each_step_once_and_forgets_the_oldest() -> None:
    history = EngineHistory()
    history.take_steps(StepReport(recent=[(1.0, 0.1, 1, 1), (2.0, 0.1, 1, 1)]))
    _, first = history.since((0, 0))
    cursor = history.cursor
    assert [step[0] for step in first] == [1.0, 2.0] and history.since(cursor) == ([], [])
    history.take_steps(StepReport(recent=[(1.5, 0.1, 1, 1)]))  # reported late: news all the same
    assert [step[0] for step in history.since(cursor)[1]] == [1.5]
    history.take_steps(StepReport(recent=[(float(at), 0.1, 1, 1) for at in range(3 * MAX_STEPS)]))
    kept = history.since(cursor)[1]
    assert len(kept) == MAX_STEPS and kept[-1][0] == 3 * MAX_STEPS - 1
