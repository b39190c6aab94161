"""Two ranks, each on a card of its own: the tokens of one card, eagerly and through graphs."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from tests.npu.engines import IS_REAL, WIDE, assert_same, plain, start, tokens
from xllm.errors import ConfigError, DeviceError

NUM_CARDS = 2
if IS_REAL and torch.npu.device_count() < NUM_CARDS:
    pytest.skip(f"two ranks need two cards, and here is {torch.npu.device_count()}", allow_module_level=True)
TWO: dict[str, Any] = {"dtype": "bfloat16", "tensor_parallel_size": NUM_CARDS}
# A sum of two roundings to bfloat16 is not the rounding of the sum: as far apart may two logprobs be that change places.
BF16_TIE = 0.1


@pytest.fixture(autouse=True)
def cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the ranks' processes see."""
    if not IS_REAL:
        monkeypatch.setenv("EMULATED_NPU_DEVICES", str(NUM_CARDS))


@pytest.mark.parametrize("mode", ["off", "auto"])
def test_the_tokens_of_one_card(mode: str) -> None:
    expected = plain(WIDE.id, device="npu", dtype="bfloat16")
    with start(WIDE.id, "npu", graph_mode=mode, **TWO) as llm:
        assert_same(tokens(llm), expected, BF16_TIE)
        graphs = llm._core.link.stats().graphs
        print(graphs)
