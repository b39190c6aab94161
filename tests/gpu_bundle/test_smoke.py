"""The first section: it finds what is wrong, and nothing runs behind one that failed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import main as command
from benchmarks.gpu import smoke
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.device import Device
from benchmarks.gpu.driver import Driver
from benchmarks.gpu.profile import FULL, QUICK, SECTIONS, TINY
from benchmarks.gpu.results import FAILED, OK, RUNNING, SKIPPED, ResultFile, load, smoke_failure
from tests.gpu_bundle.conftest import DryRun

DRY = ("--device", "cpu", "--profile", "tiny")
pytestmark = pytest.mark.usefixtures("one_thread")


def run(folder: Path) -> list[dict[str, Any]]:
    bench = Bench(Device("cpu"), TINY, ResultFile(folder), until_s=time.time() + 200, scratch=folder, out=folder)
    bench.section = "smoke"
    smoke.run(bench)
    return bench.results.rows


def test_it_is_the_first_and_leaves_the_others_their_time() -> None:
    assert SECTIONS[0] == "smoke"
    for profile in (QUICK, FULL):
        assert sum(profile.section_s.values()) < 560


def test_every_engine_was_checked(dry_run: DryRun) -> None:
    rows = {row["id"]: row for row in dry_run.rows("smoke")}
    assert set(rows) == {f"smoke/{turn}/engine {number}" for turn in range(2) for number in range(2)}
    for row in rows.values():
        assert row["status"] == OK and row["places_ahead"] > 40
        assert row["graphs"]["captures"] >= 2 and sum(row["graphs"]["replays"].values()) > 10


def test_wrong_tokens_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Driver.run

    def wrong(driver: Driver) -> Any:
        found = whole(driver)
        for deltas in found.values():
            for delta in deltas:
                delta.token_ids[:] = [(token + 1) % smoke.VOCAB for token in delta.token_ids]
        return found

    monkeypatch.setattr(Driver, "run", wrong)
    rows = run(tmp_path)
    assert len(rows) == 4 and all(row["status"] == FAILED and "sure tokens are others" in row["why"] for row in rows)
    assert smoke_failure({"sections": {"smoke": {"status": OK}}, "rows": rows}).startswith("smoke failed: smoke/0/eng")


def test_an_engine_that_does_not_start_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as the second of a process whose pinned memory the driver refuses."""
    whole, made = Driver.__init__, []

    def refuse(driver: Driver, *arguments: Any, **settings: Any) -> None:
        if made:
            raise MemoryError("error 712")
        made.append(driver)
        whole(driver, *arguments, **settings)

    monkeypatch.setattr(Driver, "__init__", refuse)
    rows = run(tmp_path)
    assert [row["status"] for row in rows] == [FAILED, FAILED] and "error 712" in rows[0]["why"]


@pytest.mark.parametrize("how", ["row", "section"])
def test_nothing_runs_behind_it(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(bench: Bench) -> None:
        if how == "section":
            raise RuntimeError("no kernel")
        bench.check("smoke/0/engine 0", False, why="no kernel")

    monkeypatch.setattr(smoke, "run", fail)
    arguments = [*SECTIONS[:4], "--out", str(tmp_path), *DRY]
    assert command.work(command.parse([*arguments, "--worker-until", str(time.time() + 100)])) == 1
    found = load(tmp_path)["sections"]
    assert {name: facts["status"] for name, facts in found.items() if name != "smoke"} == dict.fromkeys(
        SECTIONS[1:4], SKIPPED)
    assert all("no kernel" in found[name]["error"] for name in SECTIONS[1:4])
    monkeypatch.setattr(command, "_run_child", lambda *arguments: pytest.fail("a section is run"))
    assert command._account(tmp_path, list(SECTIONS[:4]), 1) == ([], "")


@pytest.mark.parametrize("code", [-11, command.UNUSABLE])
def test_nothing_runs_where_its_process_dies(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def die(args: Any, sections: list[str], *rest: Any) -> int:
        calls.append(sections)
        results = ResultFile(tmp_path)
        results.begin("smoke", until=time.time() + 100)
        if code == command.UNUSABLE:  # a row says what the device did
            results.add({"section": "smoke", "id": "smoke/0", "status": FAILED, "why": "illegal access"})
        assert results.sections["smoke"]["status"] == RUNNING
        return code

    monkeypatch.setattr(command, "_run_child", die)
    assert command.main(["smoke", "ops", "--out", str(tmp_path), *DRY]) == 1
    assert calls == [["smoke", "ops"]]
    found = load(tmp_path)["sections"]
    assert found["smoke"]["status"] == FAILED and found["ops"]["status"] == SKIPPED


def test_an_old_failure_does_not_stop_other_sections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ResultFile(tmp_path).end("smoke", FAILED, error="then")

    def good(args: Any, sections: list[str], *rest: Any) -> int:
        for name in sections:
            ResultFile(tmp_path).end(name, OK)
        return 0

    monkeypatch.setattr(command, "_run_child", good)
    command.main(["ops", "--out", str(tmp_path), *DRY])
    assert load(tmp_path)["sections"]["ops"]["status"] == OK
