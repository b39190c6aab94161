"""The file that an engine begins with: it goes there and back, and what is wrong in it is named."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from tests.cost.machine import steps
from xllm.cost.cost_file import CostOrigin, profile_to_json, read_cost_file
from xllm.cost.observations import MeasuredMove, Profile
from xllm.errors import ConfigError

ORIGIN = CostOrigin(version="1.0", model="a", config="c0ffee", quantization=None, device="cpu", device_name="EPYC",
                dtype="float32", kv_dtype="float32", num_threads=2, tensor_parallel_size=1)
PROFILE = Profile(list(steps(20)), [MeasuredMove("load", 4096, 1e-4), MeasuredMove("transfer", 1e6, 2e-3)])


def test_what_is_written_is_read(tmp_path: Path) -> None:
    for profile in (PROFILE, Profile()):
        file = tmp_path / "profile.json"
        file.write_text(json.dumps({**profile_to_json(ORIGIN, profile), "more": 1}))
        assert read_cost_file(file) == (ORIGIN, profile)


@pytest.mark.parametrize(("path", "value", "said"), [
    (("format",), 2, "format must be 1, got 2"),
    (("origin",), None, "origin must be an object"),
    (("origin", "more"), 1, "origin must have exactly"),
    (("origin", "num_threads"), "2", "origin.num_threads"),
    (("origin", "device"), None, "origin.device"),
    (("profile",), {"steps": {}}, "profile must have exactly"),
    (("profile", "steps", "num_decode_rows"), [1.0], "the lists of profile.steps"),
    (("profile", "steps", "seconds"), [0.0] * 20, "profile.steps.seconds"),
    (("profile", "steps", "seconds"), [float("nan")] * 20, "not.* JSON|profile.steps.seconds"),
    (("profile", "steps", "num_decode_rows"), [-1] * 20, "profile.steps.num_decode_rows"),
    (("profile", "steps", "num_decode_rows"), [True] * 20, "profile.steps.num_decode_rows"),
    (("profile", "steps", "num_decode_rows"), "many", "profile.steps.num_decode_rows"),
    (("profile", "moves"), [], "profile.moves must be an object"),
    (("profile", "moves", "load"), {"num_bytes": [1]}, "profile.moves.load must have exactly"),
])
def test_what_is_wrong_is_named(tmp_path: Path, path: tuple[str, ...], value: object, said: str) -> None:
    data: Any = json.loads(json.dumps(profile_to_json(ORIGIN, PROFILE)))
    place = data
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    file = tmp_path / "profile.json"
    file.write_text(json.dumps(data))
    with pytest.raises(ConfigError, match=said) as raised:
        read_cost_file(file)
    assert str(raised.value).startswith("cost_profile: ") and str(file) in str(raised.value)


def test_all_that_costs_depend_on_is_compared() -> None:
    path = Path("profile.json")
    ORIGIN.check(dataclasses.replace(ORIGIN, model="./a"), path)  # the same model by another path
    for field in dataclasses.fields(CostOrigin):
        if field.name == "model":
            continue
        here = dataclasses.replace(ORIGIN, **{field.name: 8 if field.type == "int" else "other"})
        with pytest.raises(ConfigError, match="model" if field.name == "config" else field.name):
            ORIGIN.check(here, path)
    here = dataclasses.replace(ORIGIN, version="2.0", device="cuda")
    with pytest.raises(ConfigError, match=r"version '1.0', here '2.0'; device 'cpu', here 'cuda'.*xllm profile --json"):
        ORIGIN.check(here, path)
