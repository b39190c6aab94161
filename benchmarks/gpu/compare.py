"""`compare OLD NEW`: what became slower, or stopped working, from one result file to another."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.results import OK, load

SLOWER, NOISY = 0.03, 0.1
SPREADS = 2.0
Row = dict[str, Any]


def main(arguments: Sequence[str]) -> int:
    """The exit status: 1 if anything is flagged."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu compare", description=__doc__)
    parser.add_argument("old", type=Path, help="gpu.json or its folder")
    parser.add_argument("new", type=Path)
    args = parser.parse_args(arguments)
    old, new = load(args.old), load(args.new)
    print(f"old: {old.get('commit')} ({old.get('source')}), new: {new.get('commit')} ({new.get('source')})")
    flagged = list(flags(old, new))
    for line in flagged:
        print(f"FLAG {line}")
    for line in improvements(old, new):
        print(f"     {line}")
    print(f"{len(flagged)} flagged of {len(_by_key(old))} rows")
    return 1 if flagged else 0


@dataclass(frozen=True)
class Measure:
    """A number of a row. least: the share of it that a difference must exceed, or twice the spread, to count."""

    name: str
    value: float
    unit: str
    higher_is_better: bool = False
    spread: float = 0.0
    least: float = SLOWER


def measures(row: Row) -> Iterator[Measure]:
    """What of a row is to stay as good: its time or else its rate, what requests wait for, what the host takes."""
    if row["status"] != OK:
        return
    if row["section"] == "baselines":  # how fast others are is no regression of ours
        if "ratio" in row:
            yield Measure("ratio", row["ratio"], "x", higher_is_better=True, least=NOISY)
    elif "us" in row:
        yield Measure("us", row["us"], "us", spread=row.get("us_spread", 0.0))
    elif "tokens_per_s" in row:  # as many as asked for, if all is well
        yield Measure("tokens_per_s", row["tokens_per_s"], "tok/s", higher_is_better=True, least=NOISY)
    for name, unit in (("ttft_ms", "ms"), ("itl_ms", "ms")):
        for percentile in ("p50", "p99"):
            if percentile in row.get(name, {}):
                yield Measure(f"{name} {percentile}", row[name][percentile], unit, least=NOISY)
    for name, unit in (("host_us", "us"), ("pct_idle_plain", "%")):
        if isinstance(row.get(name), (int, float)):
            yield Measure(name, row[name], unit, least=NOISY)


def flags(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    """Rows that were good and are no more, and numbers that are worse by more than 3 % (10 % where a run tells them
    but once), or than twice the spread."""
    found = _by_key(new)
    for key, before in _by_key(old).items():
        if before["status"] != OK:
            continue
        after = found.get(key)
        if after is None or after["status"] != OK:
            yield f"{key[1]}: was ok, is {'missing' if after is None else after['status']}"
        else:
            yield from (_line(key[1], a, b) for a, b in _pairs(before, after) if is_worse(a, b))


def _pairs(before: Row, after: Row) -> Iterator[tuple[Measure, Measure]]:
    now = {measure.name: measure for measure in measures(after)}
    return ((measure, now[measure.name]) for measure in measures(before) if measure.name in now)


def is_worse(before: Measure, after: Measure) -> bool:
    difference, spread = after.value - before.value, max(before.spread, after.spread)
    if before.higher_is_better:
        difference = -difference
    return difference > before.least * abs(before.value) or (spread > 0 and difference > SPREADS * spread)


def improvements(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    found = _by_key(new)
    for key, before in _by_key(old).items():
        if key in found:
            yield from (_line(key[1], a, b) for a, b in _pairs(before, found[key]) if is_worse(b, a))


def _by_key(data: dict[str, Any]) -> dict[tuple[str, str], Row]:
    return {(row["section"], row["id"]): row for row in data["rows"]}


def _line(id: str, before: Measure, after: Measure) -> str:
    spread, name = max(before.spread, after.spread), "" if before.name == "us" else f" {before.name}"
    change = 100 * (after.value / before.value - 1) if before.value else 100.0
    noise = f", spread {spread:.1f} {before.unit}" if spread else ""
    if spread and abs(after.value - before.value) <= SPREADS * spread:
        noise += ", within twice the spread"
    return f"{id}:{name} {before.value:.1f} -> {after.value:.1f} {before.unit} ({change:+.1f} %{noise})"
