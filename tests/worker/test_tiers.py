"""Host memory and disk below two ranks: each moves its own bytes, and a move is done when both have done it."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest

from tests.worker.test_processes import GREEDY, PROMPTS, TWO, tokens
from xllm import LLM
from xllm.errors import EngineDeadError

pytestmark = pytest.mark.usefixtures("checked", "pooled_ranks")
TIERS = {**TWO, "host_cache_size": "16MiB"}
SHORT = {"num_kv_blocks": 34, "max_num_seqs": 3, "watermark": 0.0, "max_model_len": 128}


@pytest.fixture
def checked(monkeypatch) -> None:
    monkeypatch.setenv("XLLM_CHECK", "1")


@pytest.fixture(scope="module")
def plain() -> list[list[int]]:
    with LLM(**{**TWO, "worker": "inline", "worker_ranks": 1, "max_model_len": 128}) as llm:
        return tokens(llm)


def settle(llm: LLM) -> None:
    while len(llm._core.scheduler.kv.source.moves):
        llm._core.scheduler.promotions.wait(0.05)
        llm._core.tick()


def test_preempted_rows_are_swapped_on_every_rank(plain):
    with LLM(**{**TIERS, **SHORT, "num_kv_blocks": 18}, preemption_mode="swap") as llm:
        assert tokens(llm) == plain
        stats = llm.stats()
        assert stats.preemptions_total > 0 and stats.swaps_total > 0
        assert stats.cached_tokens_by_tier_total["l3"] == 0  # what came back was no prefix hit of a new request
        assert stats.kv_lanes["load"].jobs_total > 0


def test_the_prefix_comes_back_from_both_ranks_host_memory(plain):
    with LLM(**TIERS, max_num_seqs=3) as llm:
        tokens(llm)
        settle(llm)
        llm._core.scheduler.kv.pool.drop_cached()
        assert [ids[:100] for ids in tokens(llm)] == [ids[:100] for ids in plain]
        assert llm.stats().cached_tokens_by_tier_total["l3"] > 0


def test_a_restart_finds_what_both_ranks_have_on_disk(plain, tmp_path):
    disk = {"disk_cache_size": "64MiB", "disk_cache_dir": str(tmp_path)}
    with LLM(**TIERS, **disk) as llm:
        assert tokens(llm) == plain
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rank-0-of-2", "rank-1-of-2"]
    with LLM(**TIERS, **disk) as llm:
        assert tokens(llm) == plain
        assert llm.stats().cached_tokens_by_tier_total["l4"] > 0
    shutil.rmtree(tmp_path / "rank-1-of-2")  # rank 0 still has its part: worth nothing alone
    with LLM(**TIERS, **disk) as llm:
        assert tokens(llm) == plain
        assert llm.stats().cached_tokens_by_tier_total["l4"] == 0


def test_what_both_ranks_have_in_a_shared_store(plain, tmp_path):
    store = {"kv_store": str(tmp_path / "kv"), "kv_store_size": "64MiB"}
    with LLM(**TIERS, **store) as llm:
        assert tokens(llm) == plain
    folders = sorted((tmp_path / "kv").iterdir())
    assert len(folders) == 2, "each rank's blocks are of its own kind"
    with LLM(**TIERS, **store) as llm:
        assert tokens(llm) == plain
        assert llm.stats().cached_tokens_by_tier_total["l5"] > 0
    for number, folder in enumerate(folders):  # what one rank has is worth nothing alone, whichever it is
        kept = shutil.move(folder, tmp_path / "kept")
        with LLM(**TIERS, **store) as llm:
            assert tokens(llm) == plain
            settle(llm)
            stats = llm.stats()
            assert stats.cached_tokens_by_tier_total["l5"] == 0, number
            assert stats.kv_lanes["put"].jobs_total > 0, "what is lacking is added again"
        shutil.rmtree(folder)
        shutil.move(kept, folder)


def test_a_key_reaches_both_ranks_and_is_in_no_process_list(plain, tmp_path):
    key = tmp_path / "key"
    key.touch(0o600)
    key.write_bytes(b"a-secret-of-more-than-32-bytes-in-all")
    disk = {"disk_cache_size": "64MiB", "disk_cache_dir": str(tmp_path / "kv")}
    with LLM(**TIERS, **disk, disk_cache_key_file=str(key)) as llm:
        assert tokens(llm) == plain
        for pid in (os.getpid(), *llm._core.link.pids):
            assert not any(b"a-secret" in (Path(f"/proc/{pid}") / name).read_bytes() for name in ("cmdline", "environ"))
    with LLM(**TIERS, **disk, disk_cache_key_file=str(key)) as llm:
        assert tokens(llm) == plain
        assert llm.stats().cached_tokens_by_tier_total["l4"] > 0
    ranks = [tmp_path / "kv" / f"rank-{rank}-of-2" for rank in (0, 1)]
    shutil.rmtree(ranks[1])
    shutil.copytree(ranks[0], ranks[1])  # the same blocks in the same slots, of another rank
    with LLM(**TIERS, **disk, disk_cache_key_file=str(key)) as llm:
        assert tokens(llm) == plain
        assert llm.stats().cached_tokens_by_tier_total["l4"] == 0


def test_a_block_that_one_rank_finds_broken_is_a_miss_for_all(plain, tmp_path):
    disk = {"disk_cache_size": "64MiB", "disk_cache_dir": str(tmp_path)}
    with LLM(**TIERS, **disk) as llm:
        tokens(llm)
    for segment in (tmp_path / "rank-1-of-2").rglob("*"):
        if segment.is_file() and segment.stat().st_size > 100_000:
            data = bytearray(segment.read_bytes())
            for place in range(len(data) // 2, len(data), 4096):  # payloads lie behind the headers
                data[place] ^= 0xFF
            segment.write_bytes(data)
    with LLM(**TIERS, **disk) as llm:
        assert tokens(llm) == plain


def test_an_engine_without_its_ranks_ends_without_storing_anything():
    with LLM(**TIERS, max_num_seqs=3) as llm:
        tokens(llm)
        os.kill(llm._core.link.pids[1], signal.SIGKILL)
        with pytest.raises(EngineDeadError, match="worker rank 1 was killed by signal 9"):
            llm.generate(PROMPTS, GREEDY, use_tqdm=False)
