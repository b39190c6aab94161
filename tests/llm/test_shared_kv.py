"""A store that engines share: what one has computed another finds, the first one killed or not; damage is a miss."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.llm.shared_child import PROMPTS, main, make_shared, settle
from tests.llm.tier_child import answer
from tests.worker.pool import context
from xllm import LLM
from xllm.errors import ConfigError
from xllm.kv import failpoints

ROOT = Path(__file__).parents[2]


def tokens(outputs: list) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def found(outputs: list) -> list[tuple[int, int]]:
    """(cached tokens that came from the store, all that could be) of each output."""
    return [(output.cached_by_tier["l5"], (len(output.prompt_token_ids) - 1) // 16 * 16) for output in outputs]


@pytest.fixture(scope="module")
def plain() -> list[list[int]]:
    with make_shared(None) as llm:
        return tokens(answer(llm, PROMPTS))


class Child:
    """An engine in a process of its own that answers some of the prompts, and then waits to be killed."""

    def __init__(self, folder: Path, first: int, last: int):
        self.num = last - first
        self._told, theirs = context().Pipe()
        self._process = context().Process(target=main, args=(str(folder), first, last, theirs))
        self._process.start()

    def wait(self) -> None:
        for _ in range(self.num):
            assert self._told.poll(60)
            assert self._told.recv() == "stored"

    def kill(self) -> None:
        self._process.kill()
        self._process.join(30)
        assert self._process.exitcode == -signal.SIGKILL
        self._told.close()


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two engines that ran at the same time, and overlapped, have left; both were killed."""
    folder = tmp_path_factory.mktemp("kv")
    children = [Child(folder, 0, 4), Child(folder, 2, 6)]
    for child in children:
        child.wait()
    for child in children:
        child.kill()
    return folder


@pytest.fixture
def folder(stored: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stored, tmp_path / "kv"))


def segments(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*/*.kv"))


def test_a_dies_and_b_reads(folder: Path, plain: list[list[int]], tmp_path: Path) -> None:
    with make_shared(folder) as llm:
        outputs = answer(llm, PROMPTS)
        assert tokens(outputs) == plain
        assert all(num == most and num >= 0.9 * len(output.prompt_token_ids) - 16
                   for (num, most), output in zip(found(outputs), outputs, strict=True))
        settle(llm)
        stats = llm.stats()
        assert stats.kv_store_up and stats.kv_lanes["put"].jobs_total == 0, "all of it is there"
        assert stats.cached_tokens_by_tier_total["l5"] == sum(num for num, _ in found(outputs))
        assert stats.external_hits_total == stats.cached_tokens_by_tier_total["l5"] and stats.kv_tiers["store"].num_used


def test_beside_a_disk(folder: Path, plain: list[list[int]], tmp_path: Path) -> None:
    disk = {"disk_cache_size": "32MiB", "disk_cache_dir": str(tmp_path / "disk")}
    with make_shared(folder, **disk) as llm:
        assert tokens(answer(llm, PROMPTS)) == plain
    shutil.rmtree(folder)
    folder.mkdir(0o700)
    with make_shared(folder, **disk) as llm:
        outputs = answer(llm, PROMPTS)
        assert tokens(outputs) == plain
        assert [output.cached_by_tier["l4"] for output in outputs] == [most for _, most in found(outputs)]


@pytest.mark.parametrize("ways", [{"kv_layout": "xtensor"}, {"kv_cache_dtype": "int8"}, {"disk_cache_key_file": ""}],
                         ids=lambda ways: next(iter(ways)))
def test_ways_to_store(tmp_path: Path, ways: dict) -> None:
    """Whatever an engine writes, one like it reads back; the first one does not find what it stored by another way."""
    key = tmp_path / "key"
    key.write_bytes(bytes(32))
    key.chmod(0o600)
    ways = {name: value or str(key) for name, value in ways.items()}
    with make_shared(tmp_path / "kv", **ways) as llm:
        first = answer(llm, PROMPTS[:2])
    with make_shared(tmp_path / "kv", **ways) as llm:
        second = answer(llm, PROMPTS[:2])
        assert all(num == most for num, most in found(second))
        assert tokens(first) == tokens(second)
    with make_shared(tmp_path / "kv") as llm:
        outputs = answer(llm, PROMPTS[:2])
        shares = "kv_layout" in ways
        assert [num for num, _ in found(outputs)] == [most if shares else 0 for _, most in found(outputs)]


def test_other_models_find_nothing(folder: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(ROOT / "xllm/bundled", tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rope_theta": 9000.0}))
    with make_shared(folder, model=str(model)) as llm:
        assert found(answer(llm, PROMPTS[:1]))[0][0] == 0
    with make_shared(folder, dtype="bfloat16") as llm:
        assert found(answer(llm, PROMPTS[:1]))[0][0] == 0


def test_damage_is_a_miss(folder: Path, plain: list[list[int]]) -> None:
    torn, flipped = segments(folder)
    size = torn.stat().st_size
    with torn.open("r+b") as file:
        file.truncate(size // 4)  # and so of prompts that only this engine had: the other two of four are in both
    with flipped.open("r+b") as file:
        file.seek(-1000, os.SEEK_END)  # of the last block
        file.write(b"\xa5\x5a")
    (torn.parent / "000900.kv").write_bytes(b"\xff" * 100_000)
    (torn.parent / "000900.kv").chmod(0o600)
    with make_shared(folder) as llm:
        outputs = answer(llm, PROMPTS)
        assert tokens(outputs) == plain
        settle(llm)
        missed = llm.stats().kv_tiers["store"].missed_total
        assert sum(num for num, _ in found(outputs)) < sum(most for _, most in found(outputs))
        assert missed["corrupt"] or missed["torn"]
        assert missed["foreign"] >= 1
    with make_shared(folder) as llm:  # what was lost was added again
        outputs = answer(llm, PROMPTS)
        assert tokens(outputs) == plain and all(num == most for num, most in found(outputs))


def test_the_folder_is_removed_under_a_running_engine(folder: Path, plain: list[list[int]],
                                                      caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), make_shared(folder) as llm:
        assert tokens(answer(llm, PROMPTS[:2])) == plain[:2]
        shutil.rmtree(folder)
        assert tokens(answer(llm, PROMPTS)) == plain
        settle(llm)
        until_s = time.monotonic() + 30.0
        while not segments(folder) and time.monotonic() < until_s:  # it looks once a second what is there
            time.sleep(0.2)
            llm._core.scheduler.kv.reset_prefix_cache()
            assert tokens(answer(llm, PROMPTS)) == plain
            settle(llm)
    assert not [record for record in caplog.records if "the shared KV store" in record.getMessage()]
    with make_shared(folder) as llm:  # it was made anew
        assert any(num for num, _ in found(answer(llm, PROMPTS)))


def test_a_store_that_refuses_blocks(tmp_path: Path, plain: list[list[int]], caplog: pytest.LogCaptureFixture) -> None:
    failpoints.arm("store.payloads_written", "ENOSPC")
    try:
        with caplog.at_level(logging.WARNING), make_shared(tmp_path / "kv") as llm:
            assert tokens(answer(llm, PROMPTS)) == plain
            settle(llm)
            stats = llm.stats()
            assert not stats.kv_store_up and stats.disks_up == {"store": False}
            assert stats.kv_tiers["store"].unsaved_total > 0
    finally:
        failpoints.disarm()
    said = [record.getMessage() for record in caplog.records if "the shared KV store" in record.getMessage()]
    assert len(said) == 1 and "No space left" in said[0]


@pytest.mark.parametrize(("settings", "message"), [
    ({"host_cache_size": "0"}, "kv_store needs host_cache_size"), ({"load_format": "dummy"}, "load_format dummy"),
    ({"kv_store": "mooncake://host:1"}, "mooncake:// is not built"), ({"kv_store_size": "much"}, "kv_store_size"),
    ({"kv_store_size": "1000"}, "holds no block"),
])
def test_what_is_refused(tmp_path: Path, settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_shared(tmp_path / "kv", **settings)


def test_a_folder_that_others_may_write_to(tmp_path: Path) -> None:
    (tmp_path / "kv").mkdir()
    (tmp_path / "kv").chmod(0o777)
    with pytest.raises(ConfigError, match="every user can plant files"):
        make_shared(tmp_path / "kv")
    (tmp_path / "kv").chmod(0o700)
    same = {"disk_cache_size": "32MiB", "disk_cache_dir": str(tmp_path / "kv")}
    with pytest.raises(ConfigError, match="the same folder"):
        make_shared(tmp_path / "kv", **same)


def test_one_that_only_reads(folder: Path, plain: list[list[int]]) -> None:
    before = segments(folder)
    with make_shared(folder, kv_store_size="0") as llm:
        outputs = answer(llm, [*PROMPTS, "Something else " * 20])
        assert tokens(outputs)[:6] == plain and isinstance(llm, LLM)
        settle(llm)
    assert segments(folder) == before
