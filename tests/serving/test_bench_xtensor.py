"""`xllm bench xtensor` on a trace of a few requests."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from serving.commands.cli import main

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")


def test_bench_xtensor(tmp_path: Path) -> None:
    trace, result = tmp_path / "trace.csv", tmp_path / "result.json"
    lengths = [f"2023-11-16 18:15:46,{100 + 37 * i % 900},{10 + 13 * i % 90}" for i in range(60)]
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *lengths]))
    assert main(["bench", "xtensor", "--trace", str(trace), "--scale", "2", "--rows", "", "--json", str(result)]) == 0
    found = json.loads(result.read_text())
    assert found["trace"]["requests"] == 60
    for replayed in (found["trace"]["no_prefix_caching"], found["trace"]["prefix_caching"]):
        assert replayed["pages_mapped"] > 60 and replayed["driver_calls"] > 0 and replayed["fallbacks"] == 0
        assert 0 < replayed["fragmentation"]["mean"] < replayed["fragmentation_if_max_len_were_reserved"] < 1
        assert 0 < replayed["touched_bytes"] <= replayed["pool_bytes"] < replayed["reserved_bytes"]
    hand_over = found["calls"]["hand_over_us"]
    assert hand_over["reused_whole"]["p50"] < hand_over["fresh_scattered"]["p50"]
    steady = found["steady_decode"]
    assert steady["calls_that_a_step_waited_for"] == 0 < steady["calls_while_another_step_ran"]


def test_a_trace_without_lengths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("a,b\n1,2\n")
    assert main(["bench", "xtensor", "--trace", str(trace), "--rows", ""]) == 1
    assert "ContextTokens" in capsys.readouterr().err
