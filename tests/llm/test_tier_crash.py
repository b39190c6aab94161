"""Real engines killed while their KV moves between the tiers: the next one on the folder gives plain output from what
was complete."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from tests.llm.tier_child import BLOCK, FRESH, STORED, answer, main, make_llm
from tests.worker.pool import context
from xllm import LLM
from xllm.kv.block import block_digests
from xllm.kv.tier_index import NO_SLOT

PROMPTS = STORED + FRESH
# Where the child dies, and at which pass. Every state of the disk is covered without a model in tests/kv.
DEATHS = ["tier.read=kill:3", "tier.loaded_layer=kill:2", "tier.saved=kill:3", "disk.payload_half=kill:9",
          "tier.written=kill:3", "tier.flush=kill:2"]  # fmt: skip


def token_ids(outputs: list) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.fixture(scope="module")
def plain() -> list[list[int]]:
    with make_llm(None) as llm:
        return token_ids(answer(llm, PROMPTS))


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which an earlier life has left all of `STORED`."""
    folder = tmp_path_factory.mktemp("kv")
    with make_llm(folder) as llm:
        answer(llm, STORED)
    return folder


def num_on_disk(llm: LLM, prompt: str) -> int:
    """How many of the prompt's tokens disk can serve: its last one is always computed."""
    ids = np.array(llm.get_tokenizer().encode(prompt), dtype=np.int32)
    disk = llm._core.scheduler.kv.source.disk
    found = [disk.find(digest) != NO_SLOT for digest in block_digests(ids[:-1], BLOCK)]
    return BLOCK * (found.index(False) if False in found else len(found))


def check_next_life(folder: Path, plain: list[list[int]]) -> None:
    with make_llm(folder) as llm:
        expected = [num_on_disk(llm, prompt) for prompt in PROMPTS]
        outputs = answer(llm, PROMPTS)
        assert token_ids(outputs) == plain
        assert [output.cached_by_tier for output in outputs] == [
            {"l1": 0, "l2": 0, "l3": 0, "l4": num_tokens, "l5": 0} for num_tokens in expected]
        lengths = [len(llm.get_tokenizer().encode(prompt)) for prompt in STORED]
        assert expected[: len(STORED)] == [(length - 1) // BLOCK * BLOCK for length in lengths]
        assert llm.stats().kv_tiers["disk"].missed_total == dict.fromkeys(
            ("torn", "corrupt", "foreign", "wrong_digest", "forged"), 0)
        llm._core.scheduler.check_integrity()


def test_a_restart_serves_from_disk_what_the_last_life_stored(stored: Path, plain: list[list[int]],
                                                              tmp_path: Path) -> None:
    check_next_life(Path(shutil.copytree(stored, tmp_path / "kv")), plain)


@pytest.mark.parametrize("death", DEATHS)
def test_after_a_kill(death: str, stored: Path, plain: list[list[int]], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(stored, tmp_path / "kv"))
    child = context().Process(target=main, args=(str(folder), death))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    check_next_life(folder, plain)
