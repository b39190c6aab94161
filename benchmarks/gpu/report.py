"""Section `report`: a table of what failed, the worst ratios to the roofline, the goals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu import goals
from benchmarks.gpu.results import ABSENT, OK, SKIPPED, ResultFile, faults

NUM_FAULTS, NUM_ABSENCES, NUM_ENGINE = 6, 6, 20


def write(out: Path) -> None:
    """Into the result file, `report.txt` beside it, and standard output."""
    results = ResultFile(out)
    results.put("goals", goals.evaluate(results.rows))
    text = "\n".join(lines(results.data)) + "\n"
    (out / "report.txt").write_text(text)
    results.end("report", OK)
    print(text, end="", flush=True)


def lines(data: dict[str, Any]) -> Iterator[str]:
    """About eighty, so that they fit what is kept of a long output."""
    env = data["env"]
    yield f"commit {data.get('commit')} source {data.get('source')} profile {data.get('profile')}"
    yield f"{env.get('device', 'unknown device')}; torch {env.get('torch')}; triton {env.get('triton')}"
    yield "ceilings: " + (", ".join(_ceilings(data["ceilings"])) or "not measured")
    yield "sections: " + ", ".join(f"{name} {facts['status']}" for name, facts in data["sections"].items()
                                   if name != "report")  # fmt: skip
    counts = Counter(row["status"] for row in data["rows"])
    yield "rows: " + ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    yield from _faults(data)
    yield from _absences(data["rows"])
    yield from _worst(data["rows"])
    yield from _engine(data["rows"])
    yield from _goals(data.get("goals", []))


def _ceilings(found: dict[str, float]) -> Iterator[str]:
    for key, unit, scale in (("bandwidth", "TB/s copy", 1e-12), ("read_bandwidth", "TB/s read", 1e-12),
                             ("rate", "TFLOP/s", 1e-12), ("rate_fp8", "TFLOP/s fp8", 1e-12),
                             ("graph_node_us", "us a graph node", 1.0)):  # fmt: skip
        if key in found:
            yield f"{found[key] * scale:.3g} {unit}"


def _faults(data: dict[str, Any]) -> Iterator[str]:
    found = faults(data)
    for fault in found[:NUM_FAULTS]:
        yield f"FAULT {fault[:150]}"
    if len(found) > NUM_FAULTS:
        yield f"FAULT and {len(found) - NUM_FAULTS} more"


def _absences(rows: list[dict[str, Any]]) -> Iterator[str]:
    """By reason, the most frequent first."""
    reasons = Counter(row.get("why", "")[:100] for row in rows if row["status"] in (ABSENT, SKIPPED))
    for why, count in reasons.most_common(NUM_ABSENCES):
        first = next(row for row in rows if row.get("why", "")[:100] == why)
        yield f"{first['status']} {count} x, such as {first['id']}: {why}"


def _worst(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Of each kind of operator the row that is furthest from its floor."""
    titles = "".join(f"{title:>8}" for title in ("floor", "bytes", "flops", "other"))
    yield f"{'of each operator what is furthest from its floor':<52}{'us':>10}{titles}"
    worst: dict[str, dict[str, Any]] = {}
    timed = [row for row in rows if row["section"] == "micro" and "floor_us" in row]
    for row in sorted(timed, key=lambda row: row["floor_us"] / row["us"]):
        worst.setdefault(kind(row), row)
    for row in worst.values():
        other = f"{row['pct_ref']:.0f} %" if "pct_ref" in row else ""
        yield (f"  {row['id']:<50}{row['us']:>10.1f}{_percent(row['floor_us'] / row['us']):>8}"
               f"{_percent(row['pct_bw'] / 100):>8}{_percent(row['pct_tf'] / 100):>8}{other:>8}")  # fmt: skip


def kind(row: dict[str, Any]) -> str:
    """The operator, and of a product its quantisation."""
    return row["id"].split("/")[0] + f" {row['cfg'].get('quantization') or ''}"


def _engine(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield f"{'engine, furthest from its floor':<52}{'ms':>10}{'floor':>8}{'plan':>8}{'tok/s':>10}"
    timed = [row for row in rows if row["section"] == "engine" and "pct_floor" in row]
    for row in sorted(timed, key=lambda row: row["pct_floor"])[:NUM_ENGINE]:
        yield (f"  {row['id']:<50}{row['us'] / 1e3:>10.2f}{_percent(row['pct_floor'] / 100):>8}"
               f"{_percent(row['pct_prediction'] / 100):>8}{row['tokens_per_s']:>10.0f}")  # fmt: skip


def _goals(found: list[dict[str, Any]]) -> Iterator[str]:
    yield f"{'goal on one H200':<36}{'goal':>12}{'roofline':>10}{'measured':>10}  unit"
    for goal in found:
        verdict = {True: "met", False: "MISSED", None: "not measured"}[goal["met"]]
        limit = f"{'>=' if goal['at_least'] else '<='} {goal['limit']:g}"
        yield (f"  {goal['what']:<34}{limit:>12}{_number(goal['roofline']):>10}{_number(goal['measured']):>10}"
               f"  {goal['unit']}, {verdict}")  # fmt: skip


def _number(number: float | None) -> str:
    return "-" if number is None else f"{number:.3g}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
