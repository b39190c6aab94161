"""What was found outlives kills, deadlines, lost devices and broken sections."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.gpu import main as command
from benchmarks.gpu.bench import Bench, DeviceLost
from benchmarks.gpu.device import Device
from benchmarks.gpu.profile import TINY
from benchmarks.gpu.results import FAILED, OK, RUNNING, SKIPPED, ResultFile, faults, load
from tests.gpu_bundle.conftest import ROOT, bundle

DRY = ("--device", "cpu", "--profile", "tiny")


def make_bench(folder: Path, *, seconds: float = 100.0) -> Bench:
    bench = Bench(Device("cpu"), TINY, ResultFile(folder), until_s=time.time() + seconds, scratch=folder, out=folder)
    bench.section = "micro"
    return bench


def test_a_kill_in_the_middle_of_a_section_loses_nothing(tmp_path: Path) -> None:
    """The rows that were there stay, the file is whole, and the section is known to be broken."""
    command = [sys.executable, "-m", "benchmarks.gpu", "ops", "--out", str(tmp_path), *DRY]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL)
    seen: list[dict[str, Any]] = []
    until = time.monotonic() + 60
    while not seen and time.monotonic() < until:
        if (tmp_path / "gpu.json").exists():
            seen = load(tmp_path)["rows"]  # whole at any moment
    [worker] = psutil.Process(process.pid).children()
    worker.kill()
    assert process.wait(timeout=30) == 1
    data = load(tmp_path)
    assert seen and data["rows"][: len(seen)] == seen
    assert data["sections"]["ops"]["status"] == FAILED and "exit status -9" in data["sections"]["ops"]["error"]


def test_no_time_left_skips_sections_and_says_so(tmp_path: Path) -> None:
    done = bundle(sys.executable, "all", "--out", str(tmp_path), "--deadline", "0", *DRY)
    sections = load(tmp_path)["sections"]
    assert done.returncode == 0 and sections.pop("report")["status"] == OK
    assert {*sections, "report"} == set(command.SECTIONS)
    assert all(facts["status"] == SKIPPED and "thought to take" in facts["error"] for facts in sections.values())


def test_a_child_that_hangs_is_ended_at_the_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "GRACE_S", 0.0)
    monkeypatch.setattr(sys, "executable", "/bin/sleep")  # of nonsense: it ends at once, with a failure
    args = command.parse(["ops", "--out", str(tmp_path), *DRY])
    assert command._run_child(args, ["ops"], "", time.time()) != 0
    script = tmp_path / "hang"
    script.write_text("#!/bin/sh\nexec sleep 60\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    began = time.monotonic()
    assert command._run_child(args, ["ops"], "", time.time() + 1) == -signal.SIGKILL
    assert time.monotonic() - began < 20


def test_a_section_that_hangs_costs_itself_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long before the deadline."""
    ResultFile(tmp_path).begin("ops", until=time.time() - command.OVERRUN_S)
    script = tmp_path / "hang"
    script.write_text("#!/bin/sh\nexec sleep 60\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    args, began = command.parse(["ops", "micro", "--out", str(tmp_path), *DRY]), time.monotonic()
    assert command._run_child(args, ["ops", "micro"], "", time.time() + 500) == -signal.SIGKILL
    assert time.monotonic() - began < 20
    assert command._account(tmp_path, ["ops", "micro"], -9) == (["micro"], "")
    assert "out of time" in load(tmp_path)["sections"]["ops"]["error"]


def test_rows_that_do_not_fit_the_deadline_are_skipped(tmp_path: Path) -> None:
    bench = make_bench(tmp_path, seconds=5.0)
    bench.attempt("long", 50.0, pytest.fail)
    bench.attempt("short", 0.1, bench.row, "inside")
    assert [(row["id"], row["status"]) for row in bench.results.rows] == [("long", SKIPPED), ("inside", OK)]
    assert faults(load(tmp_path)) == []


def test_an_exception_is_a_row_with_its_traceback_and_the_next_one_runs(tmp_path: Path) -> None:
    bench = make_bench(tmp_path)
    bench.attempt("broken", 0.0, lambda: 1 / 0)
    bench.attempt("good", 0.0, bench.row, "good row")
    broken, good = bench.results.rows
    assert broken["status"] == FAILED and "ZeroDivisionError" in broken["traceback"] and good["status"] == OK
    assert faults(load(tmp_path)) == ["micro: broken: ZeroDivisionError: division by zero"]


def test_a_lost_device_ends_the_section_and_its_row_is_not_tried_again(tmp_path: Path,
                                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    bench = make_bench(tmp_path)
    bench.attempt("before", 0.0, bench.row, "before")
    monkeypatch.setattr(Device, "is_usable", lambda self: False)
    with pytest.raises(DeviceLost):
        bench.attempt("outer", 0.0, bench.attempt, "illegal access", 0.0, lambda: 1 / 0)
    assert [row["id"] for row in bench.results.rows] == ["before", "illegal access"]
    again = make_bench(tmp_path)
    again.results.begin("micro", keep_rows=True)
    for id in ("before", "illegal access"):
        again.attempt(id, 0.0, pytest.fail)
    again.attempt("after", 0.0, again.row, "after")
    assert [row["id"] for row in load(tmp_path)["rows"]] == ["before", "illegal access", "after"]


@pytest.mark.parametrize(("begun", "code", "expected"), [
    ({}, 1, (["micro", "engine"], "")),
    ({"ops": RUNNING}, -9, (["micro", "engine"], "")),
    ({"ops": RUNNING}, command.UNUSABLE, (["ops", "micro", "engine"], "ops")),
    ({"ops": OK, "micro": RUNNING}, command.UNUSABLE, (["micro", "engine"], "micro")),
    ({"ops": OK, "micro": SKIPPED}, -11, (["engine"], "")),
    ({"ops": OK, "micro": SKIPPED, "engine": FAILED}, 0, ([], "")),
])  # fmt: skip
def test_what_is_still_to_do_after_a_child_has_ended(tmp_path: Path, begun: dict[str, str], code: int,
                                                     expected: tuple[list[str], str]) -> None:
    results = ResultFile(tmp_path)
    for name, status in begun.items():
        results.end(name, status)
    assert command._account(tmp_path, ["ops", "micro", "engine"], code) == expected
    broken = [name for name, facts in load(tmp_path)["sections"].items() if facts["status"] == FAILED]
    assert broken == (["engine"] if "engine" in begun else ["ops"] if expected[0][:1] == ["micro"] and
                      expected[1] == "" else [])  # fmt: skip


def test_a_device_that_is_not_there_is_named(tmp_path: Path) -> None:
    done = bundle(sys.executable, "env", "ops", "--out", str(tmp_path), "--device", "cuda")
    assert done.returncode == 1
    assert {facts["status"] for facts in load(tmp_path)["sections"].values()} == {FAILED}
    assert "FAULT section ops" in done.stderr and "cuda" in load(tmp_path)["sections"]["ops"]["error"].lower()


def test_a_write_that_breaks_off_leaves_the_old_file(tmp_path: Path) -> None:
    results = ResultFile(tmp_path)
    results.add({"section": "ops", "id": "a", "status": OK})
    with pytest.raises(TypeError):
        results.add({"section": "ops", "id": "b", "status": OK, "cfg": object()})
    assert [row["id"] for row in load(tmp_path)["rows"]] == ["a"]


def test_a_section_leaves_the_later_ones_their_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left: dict[str, float] = {}

    def note(bench: Bench, name: str, *, resumed: bool) -> None:
        left[name] = bench.left_s

    monkeypatch.setattr(command, "_run_section", note)
    args = command.parse(["ops", "e2e", "micro", "--out", str(tmp_path), *DRY])
    args.worker_until = time.time() + 40.0
    command.work(args)
    after = {"ops": ("e2e", "micro"), "e2e": ("micro",), "micro": ()}
    for name, later in after.items():
        assert left[name] == pytest.approx(40.0 - sum(TINY.section_s[n] for n in later), abs=1.0)


def test_a_section_that_begins_again_loses_its_own_rows_alone(tmp_path: Path) -> None:
    results = ResultFile(tmp_path)
    results.add({"section": "ops", "id": "a", "status": OK}, {"section": "micro", "id": "b", "status": OK})
    results.begin("ops")
    assert [row["id"] for row in load(tmp_path)["rows"]] == ["b"]
    assert ResultFile(tmp_path, commit="x").data["commit"] == "x"


def test_numbers_that_json_lacks_become_words(tmp_path: Path) -> None:
    bench = make_bench(tmp_path)
    bench.row("nan", err=float("nan"), inner={"worst": [float("inf")]})
    row = json.loads((tmp_path / "gpu.json").read_text(), parse_constant=pytest.fail)["rows"][0]
    assert (row["err"], row["inner"]) == ("nan", {"worst": ["inf"]})
