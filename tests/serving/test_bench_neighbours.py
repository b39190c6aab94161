"""`xllm bench neighbours`: a short run with real neighbours, and what its figures are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.cpu.neighbours import PeersBench
from serving.commands.bench import neighbours_bench
from serving.commands.bench.neighbours_bench import summary
from serving.commands.bench.random_model import write_checkpoint
from serving.commands.cli import main
from xllm import env

SHAPE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
         "intermediate_size": 128, "vocab_size": 256}


def test_one_round_beside_one_neighbour(tmp_path: Path) -> None:
    file, folder = tmp_path / "result.json", write_checkpoint(tmp_path / "model", SHAPE)
    assert main(["bench", "neighbours", "--model", str(folder), "--rows", "beside_1", "--rounds", "1",
                 "--tokens", "4", "--threads", "2", "--json", str(file)]) == 0
    result = json.loads(file.read_text(encoding="utf-8"))
    row = result["ratios"]["beside_1"]
    rates = result["tokens_per_s"]
    assert row["median"] == pytest.approx(rates["beside_1"]["median"] / rates["beside_1_alone"]["median"], abs=0.01)
    assert row["goal"] == 0.6 and row["is_met"] == (row["median"] >= 0.6)
    counts = {name: count["median"] for name, count in result["neighbours_count_per_s"].items()}
    assert counts.keys() >= {"beside_1_neighbours_count", "neighbours_alone_1_count"} and min(counts.values()) > 1000
    assert result["ratios"]["neighbour_keeps_1"]["median"] == pytest.approx(
        counts["beside_1_neighbours_count"] / counts["neighbours_alone_1_count"], abs=0.01)
    assert result["environment"]["cpu"]


def test_two_servers_are_driven_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, folder = tmp_path / "result.json", write_checkpoint(tmp_path / "model", SHAPE)
    monkeypatch.setattr(neighbours_bench, "REST_S", 0.05)
    assert main(["bench", "neighbours", "--model", str(folder), "--rows", "two_servers", "--rounds", "1",
                 "--tokens", "8", "--server-threads", "1", "--json", str(file)]) == 0
    result = json.loads(file.read_text(encoding="utf-8"))
    rates = {name: rate["median"] for name, rate in result["tokens_per_s"].items()}
    assert rates.keys() == {"one_server", "two_servers"} and result["server_threads"] == 1
    row = result["ratios"]["two_servers"]
    assert row["median"] == pytest.approx(rates["two_servers"] / rates["one_server"], abs=0.01) and row["goal"] == 0.9


def test_processes_are_not_told_a_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    with env.openmp_number_unset():
        assert "OMP_NUM_THREADS" not in env.for_child()
    assert env.for_child()["OMP_NUM_THREADS"] == "3"


def test_what_a_neighbour_keeps_is_told_for_each_engine() -> None:
    rates = {"beside_2_neighbours_count": [50.0, 60.0], "llamacpp_2_neighbours_count": [40.0, 20.0],
             "neighbours_alone_2_count": [100.0, 80.0]}
    ratios = summary(rates, PeersBench.RATIOS)["ratios"]
    assert {name: (row["median"], row["min"], row["max"]) for name, row in ratios.items()} == {
        "neighbour_keeps_2": (0.625, 0.5, 0.75), "llamacpp_neighbour_keeps_2": (0.325, 0.25, 0.4)}


def test_ratios_are_of_the_same_round() -> None:
    rates = {"alone": [10.0, 40.0, 90.0], "baseline_alone": [10.0, 20.0, 100.0], "beside_1": [1.0]}
    assert summary(rates, PeersBench.RATIOS)["ratios"] == {"alone": {
        "median": 1.0, "min": 0.9, "max": 2.0, "goal": 0.98, "is_met": True,
        "what": "decode, batch 1, no neighbour: over the baseline tree's"}}


@pytest.mark.parametrize(("flags", "said"), [(["--rows", "beside_1,beside_9"], "beside_9 unknown"),
                                             (["--server-threads", "0"], "server_threads must be at least 1"),
                                             (["--rounds", "0"], "rounds must be at least 1"),
                                             (["--tokens", "1"], "tokens must be at least 2")])
def test_wrong_flags_are_named(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "neighbours", *flags]) == 1
    assert said in capsys.readouterr().err
