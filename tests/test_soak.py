"""A short soak of a real server, and that a long one would notice what leaks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.soak.gauges import COUNTS, Sample, slope_bytes
from tests.soak.run import judge, latency_table, run
from tests.soak.traffic import MIX

MIB = 2**20
AT_REST = {"running": 0.0, "kv_blocks_held": 0.0, "open_calls": 0.0}


def samples(grows_bytes: int, num: int = 100, every: int = 1000) -> list[Sample]:
    """A server whose memory jumps about by 1 MiB, and grows by so much a request in the engine."""
    return [Sample(at * every, {"api": 80 * MIB, "engine": 300 * MIB + at % 2 * MIB + at * every * grows_bytes},
                   dict.fromkeys(COUNTS, 10)) for at in range(1, num + 1)]


def test_a_short_soak(tmp_path: Path) -> None:
    result = run(150, 0, 24, tmp_path / "log.txt")
    assert result["problems"] == [] and result["errors"] == [], (tmp_path / "log.txt").read_text()[-2000:]
    assert result["requests"] == 150 == sum(result["statuses"].values())
    assert set(result["by_kind"]) == {kind.__name__ for kind in MIX}
    assert set(result["statuses"]) <= {"200", "400", "403", "404", "504", "503 in the stream", "left"}
    assert not any(result["at_rest"].values())


def test_flat_is_no_problem() -> None:
    flat = samples(0)
    assert judge(flat, flat[0], flat[-1], AT_REST, 0) == []


@pytest.mark.parametrize("leak_bytes", [1024, 10_000])
def test_memory_that_grows_with_every_request(leak_bytes: int) -> None:
    grown = samples(leak_bytes)
    assert slope_bytes(grown, "engine") == pytest.approx(leak_bytes, rel=0.1)
    problem, = judge(grown, grown[0], grown[-1], AT_REST, 0)
    assert problem.startswith("engine grew by")


def test_memory_that_was_allocated_once() -> None:
    """Caches that fill up and stay: it is the last half that counts."""
    early = samples(0, 100)
    warm = [replace(sample, rss_bytes={**sample.rss_bytes, "engine": 100 * MIB}) for sample in early[:30]]
    assert judge([*warm, *early[30:]], warm[0], early[-1], AT_REST, 0) == []


@pytest.mark.parametrize("name", COUNTS)
def test_what_is_not_given_back(name: str) -> None:
    flat = samples(0)
    more = replace(flat[-1], counts={**flat[-1].counts, name: 60})
    problem, = judge(flat, flat[0], more, AT_REST, 0)
    assert problem == f"{name} grew from 10 to 60"


def test_blocks_calls_and_answers() -> None:
    flat = samples(0)
    found = judge(flat, flat[0], flat[-1], {**AT_REST, "kv_blocks_held": 3.0, "open_calls": 1.0}, 2)
    assert found == ["2 requests got no answer or a wrong one", "kv_blocks_held is 3 at the end",
                     "open_calls is 1 at the end"]


def test_the_latency_table() -> None:
    table = latency_table({"chat": [0.001 * value for value in range(1, 101)]})
    assert table == {"chat": {"num": 100, "p50_ms": 50.0, "p99_ms": 99.0}}
