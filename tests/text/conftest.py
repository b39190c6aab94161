"""Fixtures: folders with one small tokenizer of every kind."""

from __future__ import annotations

from pathlib import Path

import pytest

import xllm
from tests.text.tiny_tokenizers import KINDS


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for kind, build in KINDS.items():
        made[kind] = tmp_path_factory.mktemp(kind)
        build(made[kind])
    return {**made, "bundled": Path(xllm.__file__).parent / "bundled"}


@pytest.fixture(params=[*KINDS, "bundled"])
def folder(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Path:
    return folders[request.param]
