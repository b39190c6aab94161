"""The benchmarks' command lines: a run against a real server, and what is said of wrong input."""

from __future__ import annotations

import importlib.util
import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest

from serving.commands.bench.cache_bench import plot, read_trace
from serving.commands.bench.optimum import optimum
from serving.commands.cli import main
from tests.serving.server_process import ServerProcess
from xllm.config import EVICTION_POLICIES
from xllm.routing.policies import POLICIES


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


def test_router_measures_the_index(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    assert main(["bench", "router", "--blocks", "4k", "--instances", "5", "--prompt-tokens", "4k",
                 "--events", "1k", "--json", str(file)]) == 0
    result = json.loads(file.read_text(encoding="utf-8"))
    assert (result["details"]["blocks"], result["details"]["evicted"]) == (4096, 0)
    decisions = result["details"]["decision_ms_by_policy"]
    assert set(decisions) == set(POLICIES) and result["decision_p99_ms"] >= result["decision_ms"] > 0
    assert all(0 < one["decision"]["p50"] < one["from_tokens"]["p50"] for one in decisions.values())
    assert result["lookup_ms"] > 0 and result["events_per_s"] > 0 and 0 < result["bytes_per_block"] <= 120
    assert result["environment"]["cpu"]


@pytest.mark.parametrize("wrong", [["--instances", "65"], ["--blocks", "100"], ["--prompt-tokens", "15"],
                                   ["--events", "0"], ["--policy", "load_aware"], ["--cache-tokens", "5"],
                                   ["--events", "5", "--trace", "x"], ["--prefill-speed", "0", "--trace", __file__],
                                   ["--policy", "best", "--trace", __file__], ["--processes"],
                                   ["--speed-up", "0.5", "--trace", __file__],
                                   ["--cost-profile", "x", "--trace", __file__],
                                   ["--prefill-speed", "9", "--processes", "--cost-profile", "x", "--trace", __file__],
                                   ["/no/such", "--trace=/no/such"],
                                   ["line 1", f"--trace={__file__}"]])
def test_router_says_what_it_cannot_measure(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "router", *wrong[not wrong[0].startswith("--"):]]) == 1
    assert wrong[0] in capsys.readouterr().err


def test_cache_replays_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.jsonl"
    lines = [{"hash_ids": [1, 2, 3]}, {"hash_ids": [1, 2, 4]}, {"hash_ids": [9]}, {"hash_ids": [1, 2, 3]}]
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert main(["bench", "cache", "--trace", str(trace), "--capacities", "3,100"]) == 0
    rates = json.loads(capsys.readouterr().out)["hit_rate_pct"]
    assert set(rates) == {*EVICTION_POLICIES, "opt"}
    assert rates["lru"] == {"3": 40.0, "100": 50.0}
    assert all(rate["100"] == 50.0 for rate in rates.values())
    assert rates["opt"]["3"] == 50.0


def test_the_rates_can_be_plotted(tmp_path: Path) -> None:
    file = tmp_path / "plot.png"
    plot("trace", {"lru": {"10": 1.0, "100": 2.0}, "opt": {"10": 3.0, "100": 4.0}}, str(file))
    assert file.read_bytes().startswith(b"\x89PNG")


def test_a_missing_matplotlib_is_said_before_the_work(monkeypatch: pytest.MonkeyPatch,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["bench", "cache", "--trace", "/no/such/trace", "--plot", "plot.png"]) == 1
    assert "xllm-engine[bench]" in capsys.readouterr().err


def test_sessions_of_a_trace_run_side_by_side(tmp_path: Path) -> None:
    """Ids are a session's own; a nested request begins so long after the one that it is part of."""
    trace = tmp_path / "sessions.jsonl"
    sessions = [{"requests": [{"t": 0, "hash_ids": [1]}, {"t": 5, "hash_ids": [1, 2]}]},
                {"requests": [{"t": 1, "hash_ids": [1], "requests": [{"t": 9, "hash_ids": [3]}]}]}]
    trace.write_text("".join(json.dumps(session) + "\n" for session in sessions), encoding="utf-8")
    requests = [blocks.tolist() for blocks in read_trace(trace)]
    first, second = requests[0][0], requests[1][0]
    assert requests[:2] == [[first], [second]]
    assert requests[2][0] == first
    assert [len(blocks) for blocks in requests] == [1, 1, 2, 1]
    assert len({block for blocks in requests for block in blocks}) == 4


def best_by_search(requests: list[list[int]], num_blocks: int) -> int:
    """Hits of the best choice among all: after each request, any set of blocks closed under prefixes."""
    parent: dict[int, int] = {}
    for blocks in requests:
        parent.update(zip(blocks[1:], blocks))
    best = {frozenset[int](): 0}
    for blocks in requests:
        reached: dict[frozenset[int], int] = {}
        for resident, hits in best.items():
            found = next((i for i, block in enumerate(blocks) if block not in resident), len(blocks))
            everything = resident | set(blocks)
            for size in range(min(num_blocks, len(everything)) + 1):
                for kept in map(frozenset, itertools.combinations(everything, size)):
                    if all(parent[block] in kept for block in kept if block in parent):
                        reached[kept] = max(reached.get(kept, 0), hits + found)
        best = reached
    return max(best.values())


def test_no_choice_of_victims_beats_the_optimum() -> None:
    rng = random.Random(0)
    for _ in range(40):
        numbers: dict[tuple[int, ...], int] = {}
        requests = []
        for _ in range(8):
            tokens = [rng.randrange(2) for _ in range(rng.randrange(1, 4))]
            requests.append([numbers.setdefault(tuple(tokens[: i + 1]), len(numbers)) for i in range(len(tokens))])
        for num_blocks in (1, 2, 4):
            rate = optimum([np.array(blocks) for blocks in requests], num_blocks)
            assert round(rate * sum(map(len, requests))) == best_by_search(requests, num_blocks)


@pytest.mark.parametrize(("args", "code", "says"), [
    (("serve", "--url", "http://127.0.0.1:9"), 1, "http://127.0.0.1:9"),
    (("latency", "--num-requests", "0"), 1, "num_requests"),
    (("cache", "--trace", "/no/such/trace"), 1, "/no/such/trace"),
    (("cache", "--trace", __file__), 1, "line 1"),
    (("cache", "--trace", __file__, "--capacities", "ten"), 2, "ten"),
    (("cache", "--trace", __file__, "--capacities", "0"), 2, "at least one"),
    (("cache", "--trace", __file__, "--policies", "clock"), 1, "clock"),
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
