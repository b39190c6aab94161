"""`xllm profile` on the bundled model, short; an engine that begins with its file; what is said of wrong input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from serving.commands.cli import main
from xllm.config import EngineConfig
from xllm.cost.cost_file import read_cost_file
from xllm.cost.cost_model import CostModel
from xllm.cost.fit import fit
from xllm.engine.core import EngineCore
from xllm.errors import ConfigError

SETTINGS = {"max_model_len": 160, "max_num_seqs": 4, "num_threads": 1}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a profile of one round has written."""
    file = tmp_path_factory.mktemp("profile") / "profile.json"
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]
    assert main(["profile", "--rounds", "1", *flags, "--json", str(file)]) == 0
    return file


def test_the_bundled_model_is_profiled(file: Path) -> None:
    result = json.loads(file.read_text(encoding="utf-8"))
    origin = result["origin"]
    assert (origin["model"], origin["device"], origin["num_threads"]) == ("bundled", "cpu", 1)
    assert origin["device_name"] == result["environment"]["cpu"] != ""
    names = [point["point"] for point in result["points"]]
    assert names[:4] == ["prefill 16", "prefill 32", "prefill 64", "prefill 128"] and "decode 4 x 64" in names
    assert all(point["measured_s"] > 0 and point["predicted_s"] > 0 for point in result["points"])
    counts = {kind: error["num"] for kind, error in result["errors"].items()}
    assert counts == {"prefill": 4, "decode": 6, "load": 8, "swap": 8} and sum(counts.values()) == len(names)
    model = CostModel.from_json(result["cost_model"])
    assert model.steps_error.num > 50 and model.moves_error["save"].num == 24
    assert model.prefill_s(128) > model.prefill_s(128, 64) > 0.0
    assert fit(read_cost_file(file).profile) == model, "an engine finds what was printed"


def test_the_table_is_for_people(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from serving.commands.profile import table

    shown = table(json.loads(file.read_text(encoding="utf-8")))
    for said in ("decode 4 x 64", "each predicted without it", "prefill   mean", "cross-validated", "GB/s"):
        assert said in shown


def test_an_engine_begins_with_what_was_measured_and_goes_on(file: Path) -> None:
    core = EngineCore(EngineConfig.from_flat(**SETTINGS, cost_profile=str(file)))
    try:
        model = fit(read_cost_file(file).profile)
        assert core.scheduler.cost.prices() == model.steps and core.scheduler.cost.knows_prefill
        assert core.scheduler.cost.model.load_s(1e6) > 0.0
        assert core.origin == read_cost_file(file).origin
    finally:
        core.shutdown()


@pytest.mark.parametrize(("more", "said"), [
    ({"quantization": "int8"}, "quantization None, here 'int8'"),
    ({"hf_overrides": '{"rope_theta": 5000.0}'}, "model 'bundled', here 'bundled' with another config"),
], ids=["quantization", "config"])
def test_another_model_is_refused_by_name(file: Path, more: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        EngineCore(EngineConfig.from_flat(**SETTINGS, **more, cost_profile=str(file)))


def test_a_file_that_is_none_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cost_profile: .*nowhere.json does not exist"):
        EngineCore(EngineConfig.from_flat(model="no/model", cost_profile=str(tmp_path / "nowhere.json")))


@pytest.mark.parametrize(("flags", "said"), [
    (["--rounds", "0"], "rounds"), (["--max-model-len", "40"], "max_model_len"),
    (["--json", "/no/such/file"], "/no/such"), (["--cost-profile", "x.json"], "cost_profile"),
])
def test_wrong_input_is_named(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", *flags]) == 1
    assert said in capsys.readouterr().err
