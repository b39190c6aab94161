"""The benchmarks' command lines: a run against a real server, and what is said of wrong input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from serving.cli import main
from tests.serving.server_process import ServerProcess


@pytest.mark.parametrize("suffix", ["", "/", "/v1"], ids=["bare", "slash", "v1"])
def test_serve_measures_a_running_server(server: ServerProcess, tmp_path: Path, suffix: str) -> None:
    file = tmp_path / "result.json"
    assert main(["bench", "serve", "--url", server.url + suffix, "--num_requests", "3", "--input-len=5",
                 "--output-len", "4", "--json", str(file)]) == 0
    result = json.loads(file.read_text(encoding="utf-8"))
    assert (result["requests"], result["failed"], result["errors"]) == (3, 0, [])
    assert result["output_tokens_per_s"] > 0
    assert result["time_to_first_token_ms"]["min"] > 0


def test_refused_requests_are_counted_and_fail_the_run(server: ServerProcess, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    assert main(["bench", "serve", "--url", server.url, "--num-requests", "2", "--input-len", "600",
                 "--json", str(file)]) == 1
    result = json.loads(file.read_text(encoding="utf-8"))
    assert result["failed"] == 2
    assert result["errors"][0].startswith("400: ")


def test_latency_measures_the_bundled_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "latency", "--num-requests", "2", "--input-len", "5", "--output-len", "3"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["model"] == "bundled"
    assert 0 < result["time_to_first_token_ms"]["min"] <= result["time_to_first_token_ms"]["p99"]
    assert result["time_per_output_token_ms"]["min"] > 0


def test_cache_replays_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.jsonl"
    lines = [{"hash_ids": [1, 2, 3]}, {"hash_ids": [1, 2, 4]}, {"hash_ids": [9]}, {"hash_ids": [1, 2, 3]}]
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert main(["bench", "cache", "--trace", str(trace), "--capacities", "100"]) == 0
    assert json.loads(capsys.readouterr().out)["hit_rate_pct"]["lru"] == {"100": 50.0}


@pytest.mark.parametrize(("args", "code", "says"), [
    (("serve", "--url", "http://127.0.0.1:9"), 1, "http://127.0.0.1:9"),
    (("latency", "--num-requests", "0"), 1, "num_requests"),
    (("cache", "--trace", "/no/such/trace"), 1, "/no/such/trace"),
    (("cache", "--trace", __file__), 1, "line 1"),
    (("cache", "--trace", __file__, "--capacities", "ten"), 2, "ten"),
    (("cache", "--trace", __file__, "--capacities", "0"), 2, "at least one"),
    (("cache", "--trase", "x"), 2, "did you mean '--trace'"),
    (("serve", "--num-request", "3"), 2, "did you mean '--num-requests'"),
])
def test_wrong_input_is_one_clear_line(capsys: pytest.CaptureFixture[str], args: tuple[str, ...], code: int,
                                       says: str) -> None:
    try:
        ended_with: object = main(["bench", *args])
    except SystemExit as stopped:
        ended_with = stopped.code
    assert ended_with == code
    assert says in capsys.readouterr().err
