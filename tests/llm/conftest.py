"""Fixtures: the bundled model, loaded once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from xllm import LLM

SETTINGS = {"device": "cpu", "dtype": "float32", "num_kv_blocks": 256, "max_model_len": 512, "num_threads": 1}


@pytest.fixture(scope="session")
def llm() -> Iterator[LLM]:
    with LLM(**SETTINGS) as loaded:
        yield loaded
