"""Sampling defaults from generation_config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from xllm.errors import ConfigError
from xllm.generation_config import read_sampling_defaults


def folder(path: Path, **content: Any) -> Path:
    (path / "generation_config.json").write_text(json.dumps(content), encoding="utf-8")
    return path


def test_defaults_are_taken_as_vllm_takes_them(tmp_path: Path) -> None:
    model = folder(tmp_path, temperature=0.7, top_p=0.9, top_k=None, eos_token_id=[1, 2], max_new_tokens=99)
    assert read_sampling_defaults("auto", model) == {"temperature": 0.7, "top_p": 0.9, "max_tokens": 99}
    assert read_sampling_defaults("vllm", model) == {}
    assert read_sampling_defaults(str(model), Path("/no/such/model"))["top_p"] == 0.9


def test_a_model_without_the_file_has_none(tmp_path: Path) -> None:
    assert read_sampling_defaults("auto", tmp_path) == {}


@pytest.mark.parametrize(("content", "says"), [({"top_p": 3}, "top_p"), ({"temperature": "hot"}, "temperature")])
def test_wrong_defaults_stop_the_start(tmp_path: Path, content: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        read_sampling_defaults("auto", folder(tmp_path, **content))


def test_a_file_that_is_no_json_or_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no"):
        read_sampling_defaults(str(tmp_path), tmp_path)
    (tmp_path / "generation_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match="not valid JSON"):
        read_sampling_defaults("auto", tmp_path)
    (tmp_path / "generation_config.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ConfigError, match="JSON object"):
        read_sampling_defaults("auto", tmp_path)
