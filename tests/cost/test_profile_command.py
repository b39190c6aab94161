"""`xllm profile` on the bundled model, short, and what is said of wrong input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from serving.commands.cli import main
from xllm.cost.cost_model import CostModel


def test_the_bundled_model_is_profiled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "profile.json"
    assert main(["profile", "--rounds", "1", "--max-model-len", "160", "--max-num-seqs", "4", "--json", str(file)]) == 0
    result = json.loads(file.read_text(encoding="utf-8"))
    assert (result["model"], result["device"]) == ("bundled", "cpu") and result["environment"]["cpu"]
    names = [point["point"] for point in result["points"]]
    assert names[:4] == ["prefill 16", "prefill 32", "prefill 64", "prefill 128"] and "decode 4 x 64" in names
    assert all(point["measured_s"] > 0 and point["predicted_s"] > 0 for point in result["points"])
    assert result["held_out_error"]["num"] == sum(point["held_out"] for point in result["points"]) > 1
    model = CostModel.from_json(result["cost_model"])
    assert model.steps_error.num > 50
    assert model.prefill_s(128) > model.prefill_s(128, 64) > 0.0
    shown = capsys.readouterr().out
    assert "decode 4 x 64" in shown and "held out" in shown and "cross-validated" in shown


@pytest.mark.parametrize(("flags", "said"), [
    (["--rounds", "0"], "rounds"), (["--max-model-len", "40"], "max_model_len"),
    (["--json", "/no/such/file"], "/no/such"),
])
def test_wrong_input_is_named(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", *flags]) == 1
    assert said in capsys.readouterr().err
