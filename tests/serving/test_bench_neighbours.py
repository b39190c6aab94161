"""`xllm bench neighbours`: a short run with real neighbours, and what its figures are."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from serving.bench.model import write_checkpoint
from serving.bench.neighbours_bench import summary
from serving.commands.cli import main

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
    assert result["neighbours_count_per_s"]["beside_1_neighbours_count"]["median"] > 1000
    assert result["environment"]["cpu"] and result["llamacpp"]


def test_ratios_are_of_the_same_round() -> None:
    args = argparse.Namespace(threads=2, rounds=3, tokens=4, model=None, baseline="tree")
    rates = {"alone": [10.0, 40.0, 90.0], "baseline_alone": [10.0, 20.0, 100.0], "beside_1": [1.0]}
    assert summary(rates, False, args)["ratios"] == {"alone": {
        "median": 1.0, "min": 0.9, "max": 2.0, "goal": 0.98, "is_met": True,
        "what": "decode, batch 1, no neighbour: over the baseline tree's"}}


@pytest.mark.parametrize(("flags", "said"), [(["--rows", "alone,beside_9"], "beside_9 unknown"),
                                             (["--rounds", "0"], "rounds must be at least 1"),
                                             (["--tokens", "1"], "tokens must be at least 2")])
def test_wrong_flags_are_named(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "neighbours", *flags]) == 1
    assert said in capsys.readouterr().err
