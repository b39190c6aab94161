"""Regressions between two files, and the goals with their rooflines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import compare, goals
from benchmarks.gpu.device import Timing
from benchmarks.gpu.main import main
from benchmarks.gpu.results import ABSENT, FAILED, OK

Row = dict[str, Any]


def row(id: str, us: float = 100.0, spread: float = 0.5, status: str = OK, **facts: Any) -> Row:
    return {"section": "micro", "id": id, "status": status, "us": us, "us_spread": spread, **facts}


def flagged(before: Row, *after: Row) -> list[str]:
    return list(compare.flags({"rows": [before]}, {"rows": list(after)}))


@pytest.mark.parametrize(("us", "spread", "is_flagged"), [
    (100.0, 0.5, False), (100.9, 0.5, False), (101.2, 0.5, True), (102.9, 5.0, False), (103.1, 5.0, True),
    (90.0, 0.5, False), (102.0, 0.0, False),
])  # fmt: skip
def test_slower_by_more_than_three_percent_or_twice_the_spread(us: float, spread: float, is_flagged: bool) -> None:
    assert bool(flagged(row("a", spread=spread), row("a", us, spread))) == is_flagged


def test_a_flag_says_what_is_within_the_noise() -> None:
    assert "within twice the spread" in flagged(row("a", spread=5.0), row("a", 104.0, 5.0))[0]
    assert "within" not in flagged(row("a"), row("a", 104.0))[0]


def test_what_was_ok_and_is_no_more() -> None:
    assert flagged(row("a")) == ["a: was ok, is missing"]
    assert flagged(row("a"), row("a", status=FAILED)) == ["a: was ok, is failed"]
    assert flagged(row("a", status=ABSENT)) == flagged(row("a", status=FAILED), row("a", status=FAILED)) == []


@pytest.mark.parametrize(("section", "before", "better", "worse"), [
    ("micro", {"us": 100.0, "us_spread": 0.1, "bytes_per_s": 5e9}, {"us": 90.0, "bytes_per_s": 6e9}, {"us": 104.0}),
    ("engine", {"us": 100.0, "us_spread": 1.0, "tokens_per_s": 10.0}, {"us": 50.0}, {"us": 150.0}),
    ("engine", {"tokens_per_s": 500.0}, {"tokens_per_s": 900.0}, {"tokens_per_s": 440.0}),
    ("engine", {"itl_ms": {"p50": 5.0, "p99": 9.0}}, {"itl_ms": {"p50": 4.0, "p99": 9.0}},
     {"itl_ms": {"p50": 5.0, "p99": 12.0}}),
    ("engine", {"ttft_ms": {"p50": 50.0}}, {"ttft_ms": {"p50": 20.0}}, {"ttft_ms": {"p50": 80.0}}),
    ("host", {"host_us": 300.0, "us": 500.0}, {"host_us": 200.0}, {"host_us": 390.0}),
    ("host", {"pct_idle_plain": 2.0}, {"pct_idle_plain": 0.5}, {"pct_idle_plain": 5.0}),
    ("baselines", {"ratio": 3.0, "us": 10.0}, {"ratio": 4.0, "us": 20.0}, {"ratio": 2.0, "us": 5.0}),
])  # fmt: skip
def test_which_way_is_worse(section: str, before: Row, better: Row, worse: Row) -> None:
    def file(change: Row) -> dict[str, Any]:
        return {"rows": [{"section": section, "id": "a", "status": OK, **before, **change}]}

    assert not [*compare.flags(file({}), file({})), *compare.flags(file({}), file(better))]
    assert len([*compare.improvements(file({}), file(better))]) == 1
    assert len([*compare.flags(file({}), file(worse))]) == 1
    assert not [*compare.improvements(file({}), file(worse))]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, us in (("old", 100.0), ("new", 120.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "gpu.json").write_text(json.dumps({"commit": name, "rows": [row("a", us)]}))
    assert main(["compare", str(tmp_path / "old"), str(tmp_path / "new")]) == 1
    assert "FLAG a: 100.0 -> 120.0 us (+20.0 %" in capsys.readouterr().out
    assert main(["compare", str(tmp_path / "new"), str(tmp_path / "old" / "gpu.json")]) == 0
    assert "-16.7 %" in capsys.readouterr().out


def test_a_timing_measures_the_same_version_twice() -> None:
    timing = Timing.of([10.0, 11.0, 10.0, 10.0, 20.0, 21.0, 20.0, 20.0])
    assert (timing.again_us, timing.spread_us, timing.samples) == ((10.0, 20.0), 10.0, 8)
    assert Timing.of([5.0]).us == 5.0


MEASURED = [
    row("decode/qwen3-8b/B1/ctx1024", 4300.0), row("decode/qwen3-0.6b/B1/ctx1024", 950.0),
    row("decode/qwen3-8b/B64/ctx1024", 7300.0), row("prefill/qwen3-8b/T2048", 50_000.0),
    row("workload/qwen3-0.6b", tokens_per_s=28_000.0), row("workload/qwen3-8b", tokens_per_s=9_000.0),
    row("batching/qwen3-0.6b", ratio=2.5), row("host/qwen3-0.6b/graphs on/overlap on/B256", host_us=401.0),
    row("host/qwen3-0.6b/graphs on/overlap on/B256/device", pct_idle=2.0),
    row("host/qwen3-0.6b/graphs off/overlap on/B256", host_us=1.0),
    row("attention.decode/qwen3-8b/B1/ctx1024", pct_bw=20.0, cfg={"kv_bytes": 4e6}),
    row("attention.decode/qwen3-8b/B256/ctx1024", pct_bw=88.0, cfg={"kv_bytes": 1.1e9}),
    row("attention.decode/qwen3-8b/B256/ctx4096", pct_bw=84.0, cfg={"kv_bytes": 4.3e9}),
    row("decode/qwen3-8b/B256/ctx1024", 1.0, status=FAILED),
    row("decode.w8kv8/qwen3-8b/B1/ctx1024", 2500.0), row("decode.kv8/qwen3-8b/B64/ctx1024", 1000.0),
]  # fmt: skip


def test_goals() -> None:
    found = {goal["what"]: goal for goal in goals.evaluate(MEASURED)}
    assert [goal["met"] for goal in found.values()] == [True, True, False, None, False, False, True, False, True,
                                                       False, True, True, None, None]  # fmt: skip
    assert found["decode attention, KV >= 1 GB"]["measured"] == 84.0
    rooflines = {what: round(goal["roofline"], 2) for what, goal in found.items() if goal["roofline"]}
    assert rooflines["decode B1 qwen3-8b ctx 1k"] == 3.56
    assert rooflines["decode B256 qwen3-8b ctx 1k"] == 13.92
    assert rooflines["prefill qwen3-8b 2k"] == 37.58
    assert rooflines["decode B64 qwen3-8b fp8 ctx 1k"] == 2.9


def test_no_goal_is_beyond_the_roofline() -> None:
    for goal in goals.GOALS:
        roofline = goal.roofline()
        assert roofline is None or goal.met(roofline)


def test_without_rows_no_goal_is_met_or_missed() -> None:
    assert {goal["met"] for goal in goals.evaluate([])} == {None}
