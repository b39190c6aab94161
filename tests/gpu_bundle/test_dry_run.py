"""Every section from end to end on a CPU, by a Python with torch, triton, transformers, safetensors and numpy alone."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from benchmarks.gpu.e2e_ways import TOLERANCE
from benchmarks.gpu.ops import operators
from benchmarks.gpu.profile import SECTIONS, TINY
from benchmarks.gpu.spot import SPOTS, WITHIN
from tests.gpu_bundle.conftest import ROOT, DryRun

ABSENT_HERE = ["fastapi", "msgspec", "zmq", "uvicorn", "pydantic", "prometheus_client", "psutil", "pytest", "xdist"]


@pytest.mark.parametrize("package", ABSENT_HERE)
def test_the_python_is_bare(bare_python: Path, package: str) -> None:
    done = subprocess.run([bare_python, "-c", f"import {package}"], capture_output=True, text=True, cwd="/")
    assert "ModuleNotFoundError" in done.stderr


def test_everything_ran_and_is_right(dry_run: DryRun) -> None:
    assert dry_run.status == 0, dry_run.output[-4000:]
    assert {name: facts["status"] for name, facts in dry_run.data["sections"].items()} == dict.fromkeys(SECTIONS, "ok")
    assert "FAULT" not in dry_run.output
    assert not [row for row in dry_run.data["rows"] if row["status"] in ("failed", "skipped")]


def test_every_operator_was_checked(dry_run: DryRun) -> None:
    checked = {row["id"]: row for row in dry_run.rows("ops") if row["status"] == "ok"}
    assert set(checked) == {*operators(), *(f"spot/{name}" for name in SPOTS)}
    assert all(row["err"] <= row["tolerance"] for row in checked.values())
    assert all(checked[name]["cases"] > 1 for name in operators())


def test_every_operator_is_also_checked_at_a_real_size_and_measured(dry_run: DryRun) -> None:
    assert {*SPOTS, *WITHIN} == set(operators()), "add a case to benchmarks/gpu/spot.py"
    kinds = {row["id"].split("/")[0].split(".")[0] for row in dry_run.rows("micro")}
    # The plan is part of the first layer's attention, and the number of stored bytes is arithmetic.
    assert kinds == set(operators()) - {"plan", "stored_bytes"}, "add a case to benchmarks/gpu/micro_*.py"


def test_every_way_to_compute_a_token_was_checked(dry_run: DryRun) -> None:
    rows = dry_run.rows("e2e")
    absent = {row["id"]: row["why"] for row in rows if row["status"] == "absent"}
    assert absent == {"Qwen3/structured": "the package llguidance is not installed"}
    checked = {row["id"].removeprefix("Qwen3/"): row for row in rows if row["status"] == "ok"}
    assert {"kv int8", "kv fp8, all", "weights fp8", "weights w8a8", "adapters, all", "preempted"} <= set(checked)
    assert all(row["check"] and row["places_ahead"] > row["places"] / 2 for row in checked.values())
    assert 0 < max(row["err"] for row in checked.values() if row["tolerance"] == TOLERANCE) < 1e-3


@pytest.mark.parametrize(("section", "ids"), [
    ("env", ["warm_up"]), ("ceilings", ["gemm_fp8", "graph_node", "transfers"]),
    ("host", ["host/tiny/graphs on/overlap on", "host/tiny/graphs off/overlap on/B4/device"]),
])  # fmt: skip
def test_what_a_cpu_cannot_do_is_said(dry_run: DryRun, section: str, ids: list[str]) -> None:
    absent = {row["id"]: row["why"] for row in dry_run.rows(section) if row["status"] == "absent"}
    assert set(ids) <= set(absent)
    assert all(why.startswith("not on this device") for why in absent.values())


def test_rows_say_what_was_measured(dry_run: DryRun) -> None:
    for row in dry_run.rows("micro"):
        assert row["us"] > 0 and row["us_spread"] >= 0 and row["samples"] >= 5 and len(row["us_again"]) == 2
        assert row["bytes"] > 0 and row["pct_bw"] > 0 and row["pct_tf"] >= 0
        assert row["cfg"]["rotated"] >= 1 and row["ceilings"]["bw"] == dry_run.data["ceilings"]["bandwidth"]
        assert row["commit"] == dry_run.data["commit"]
    kinds = {row["id"].split("/")[0] for row in dry_run.rows("micro")}
    assert {"attention.decode", "attention.prefill.fp8", "attention.decode.int8", "sample.greedy", "lora_add",
            "export_blocks", "import_blocks.fp8", "penalise"} <= kinds  # fmt: skip


def test_engine_rows_have_their_prediction(dry_run: DryRun) -> None:
    predicted = [row for row in dry_run.rows("engine") if "prediction" in row]
    assert {row["id"] for row in predicted} == set(dry_run.data["predictions"]) and len(predicted) == 8
    assert all(row["prediction"] == dry_run.data["predictions"][row["id"]] for row in predicted)
    assert all(row["prediction"]["us"] >= row["floor_us"] > 0 for row in predicted)


def test_the_offline_workload_came_whole_and_no_request_was_lost(dry_run: DryRun) -> None:
    rows = {row["id"]: row for row in dry_run.rows("engine")}
    assert rows["workload/tiny"]["cfg"]["sequences"] == TINY.workload[0]
    assert rows["workload/tiny/all tokens"]["status"] == "ok"
    online = rows["online/tiny/0.5"]
    assert online["requests"] >= 1 and {"p50", "p99"} <= set(online["ttft_ms"])
    assert rows["online/tiny/0.5/none lost"]["status"] == "ok"


def test_the_hosts_time_is_told_by_phase(dry_run: DryRun) -> None:
    row = next(row for row in dry_run.rows("host") if row["id"].endswith("overlap on/B4"))
    assert {"schedule", "update", "start", "wait"} <= set(row["phases_us"])
    assert 0 < row["phases_us"]["schedule"] < row["host_us"]


def test_the_baselines_ran_on_the_same_work(dry_run: DryRun) -> None:
    rows = {row["id"]: row for row in dry_run.rows("baselines")}
    assert rows["generate/tiny"]["ratio"] > 0
    assert rows["batching/tiny"]["ratio"] > 0 and rows["batching/tiny"]["unfinished"] == 0


def test_the_report_fits_a_screen_and_the_files_the_way_back(dry_run: DryRun) -> None:
    lines = (dry_run.folder / "report.txt").read_text().splitlines()
    assert 25 <= len(lines) <= 85 and max(map(len, lines)) <= 150 and sum(map(len, lines)) < 10_000
    table = {line.split("/")[0].strip() for line in lines}
    assert {row["id"].split("/")[0] for row in dry_run.rows("micro")} <= table
    assert sum("not measured" in line for line in lines) == len(dry_run.data["goals"]) == 14
    files = [path for path in dry_run.folder.rglob("*") if path.is_file()]
    assert len(files) <= 8 and sum(path.stat().st_size for path in files) < 16 << 20
    assert dry_run.data["source"] and (ROOT / "docs" / "gpu.md").exists()
