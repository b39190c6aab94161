"""Two ranks, each on a card of its own: the tokens of one card, eagerly and through graphs."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.npu.engines import IS_REAL, LATENT, WIDE, assert_same, folder, plain, prompt_logprobs, start, tokens
from tests.parallel.ranks import Ranks
from xllm.errors import ConfigError, DeviceError, EngineDeadError
from xllm.worker.processes import HEARTBEAT_S

NUM_CARDS = 2
if IS_REAL and torch.npu.device_count() < NUM_CARDS:
    pytest.skip(f"two ranks need two cards, and here is {torch.npu.device_count()}", allow_module_level=True)
CASES = "tests.npu.tensor_cases"
TWO: dict[str, Any] = {"dtype": "bfloat16", "tensor_parallel_size": NUM_CARDS}
# Two tokens whose logprobs differ by less may change places: a sum of two numbers of bfloat16 is rounded otherwise than
# a whole one.
BF16_TIE = 0.1 if IS_REAL else 0.0625  # two steps of bfloat16 between 4 and 8


@pytest.fixture(autouse=True)
def machine_with_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the ranks' processes see, who compare what they drew in every step."""
    monkeypatch.setenv("XLLM_CHECK", "1")
    if not IS_REAL:
        monkeypatch.setenv("EMULATED_NPU_DEVICES", str(NUM_CARDS))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    started = Ranks(tmp_path_factory.mktemp("ranks"), "torch_npu", "torch._dynamo", CASES)
    yield started
    started.close()


@pytest.mark.parametrize(("model", "settings", "order"), [
    (WIDE.id, {"graph_mode": "off"}, ""), (WIDE.id, {}, ""), (WIDE.id, {}, "1"),
    (WIDE.id, {"host_cache_size": "8MiB", "num_kv_blocks": 7, "max_num_batched_tokens": 43,
               "speculative_method": "ngram"}, ""), (WIDE.id, {"quantization": "w8a8", "kv_layout": "xtensor"}, ""),
    ("mixtral", {"dtype": "float16"}, ""),
], ids=["eager", "graphs", "graphs, worst order", "tiers, chunks, drafts", "w8a8, xtensor", "experts"])
def test_the_tokens_of_one_card(model: str, settings: dict[str, Any], order: str,
                                monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts in float16: a token whose sums are rounded otherwise may get another one."""
    settings = {**TWO, **settings}
    expected = plain(model, settings.get("quantization"), device="npu", dtype=settings["dtype"])
    monkeypatch.setenv("EMULATED_NPU_ORDER", order)
    with start(model, "npu", **settings) as llm:
        assert_same(tokens(llm), expected, BF16_TIE)
        time.sleep(2 * HEARTBEAT_S)  # they tell what they have with their signs of life
        llm._core.tick()
        graphs = llm._core.link.stats().graphs
        assert (graphs is None) == (settings.get("graph_mode") == "off")
        assert graphs is None or (sum(graphs.replays_total.values()) > 10 and "capture_failed" not in
                                  graphs.fallbacks_total)


def test_experts_of_codes() -> None:
    """Tokens are no measure here: a code that differs by one may choose another expert. On CPUs it is as much. One card
    joins gate and up with what follows; two have a row's codes by its largest number on both."""
    settings: dict[str, Any] = {"dtype": "float16", "quantization": "w8a8", "graph_mode": "off"}
    found = []
    for more in ({}, TWO):
        with start("mixtral", "npu", **{**more, **settings}) as llm:
            found.append(prompt_logprobs(llm))
    assert (found[0] - found[1]).abs().mean() < 0.06


@pytest.mark.skipif(IS_REAL, reason="looks into the emulator's graphs")
@pytest.mark.parametrize(("mode", "are_lost"), [("AI_CPU", False), ("AIV", True)])
def test_collectives_in_graphs(mode: str, are_lost: bool, ranks: Ranks) -> None:
    """On vector cores they do not go with task groups; an engine does not start so."""
    env = {"EMULATED_NPU_DEVICES": str(NUM_CARDS), "HCCL_OP_EXPANSION_MODE": mode, "HCCL_EXEC_TIMEOUT": "20"}
    texts = ranks.check(f"{CASES}:graphs", NUM_CARDS, env=env, folder=folder(WIDE.id), are_lost=are_lost)
    assert len({text.splitlines()[-1] for text in texts}) == 1


def test_a_rank_that_is_killed() -> None:
    """The others, which wait for it on the device, end with it, and it is the one that is named."""
    with start(WIDE.id, "npu", **TWO) as llm:
        tokens(llm)
        os.kill(llm._core.link.pids[1], signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(EngineDeadError, match="worker rank 1 was killed by signal 9"):
            tokens(llm)
        assert time.monotonic() - began < 10


def test_fewer_cards_than_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "1")
    words = "2 ranks need 2 devices, one each, and torch sees 1 of the kind npu: .* ASCEND_RT_VISIBLE_DEVICES"
    with pytest.raises(DeviceError, match=words):
        start(WIDE.id, "npu", **TWO)


def test_the_cards_that_the_environment_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """In its order; collectives by vector cores, which eager steps may use."""
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "1,0")
    monkeypatch.setenv("HCCL_OP_EXPANSION_MODE", "AIV")
    with start(WIDE.id, "npu", graph_mode="off", **TWO) as llm:
        assert_same(tokens(llm), plain(WIDE.id, device="npu", dtype="bfloat16"), BF16_TIE)


def test_vector_cores_and_graphs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HCCL_OP_EXPANSION_MODE", "AIV")
    with pytest.raises(ConfigError, match=r"AIV does not go with graphs .*507009.* set it to AI_CPU, or take --graph"):
        start(WIDE.id, "npu", **TWO)


def test_ranks_share_the_heads_of_latents() -> None:
    """Each has all latents, and two of four heads beside those of zeros that fill the operator's."""
    with start(LATENT.id, "npu", **TWO) as llm:
        assert_same(tokens(llm), plain(LATENT.id, device="npu", dtype="bfloat16"), BF16_TIE)
