"""The goals on one H200 in bfloat16, each with its roofline there and what was measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu.roofline import W8_KV8, decode_s, make_workload, prefill_s, workload_s
from benchmarks.gpu.shapes import SHAPES

Rows = dict[str, dict[str, Any]]
GIGABYTE = 1e9


@dataclass(frozen=True, kw_only=True)
class Goal:
    """limit: at most that (at_least: at least), in `unit`, as are roofline (None: there is none) and measured, which
    finds the number among the rows or gives None."""

    what: str
    limit: float
    unit: str
    roofline: Callable[[], float | None]
    measured: Callable[[Rows], float | None]
    at_least: bool = False

    def met(self, value: float | None) -> bool | None:
        """None: not measured."""
        if value is None:
            return None
        slack = 1e-9 * self.limit  # of a conversion of units
        return value >= self.limit - slack if self.at_least else value <= self.limit + slack


def _decode(name: str, batch: int, limit: float) -> Goal:
    return Goal(what=f"decode B{batch} {name} ctx 1k", limit=limit, unit="ms",
                roofline=lambda: decode_s(SHAPES[name], batch, 1024) * 1e3,
                measured=lambda rows: value(rows, f"decode/{name}/B{batch}/ctx1024", "us", 1e-3))


def _decode_in_bytes(name: str, batch: int, limit: float) -> Goal:
    """The second stage: weights and KV in fp8."""
    return Goal(what=f"decode B{batch} {name} fp8 ctx 1k", limit=limit, unit="ms",
                roofline=lambda: decode_s(SHAPES[name], batch, 1024, stored=W8_KV8) * 1e3,
                measured=lambda rows: value(rows, f"decode.w8kv8/{name}/B{batch}/ctx1024", "us", 1e-3))


def _workload(name: str, limit: float) -> Goal:
    def roofline() -> float:
        work = make_workload()
        return work.num_output_tokens / workload_s(SHAPES[name], work) * 1e-3

    return Goal(what=f"256 requests {name}", limit=limit, unit="k tok/s", at_least=True, roofline=roofline,
                measured=lambda rows: value(rows, f"workload/{name}", "tokens_per_s", 1e-3))


def value(rows: Rows, id: str, key: str, scale: float = 1.0) -> float | None:
    number = rows.get(id, {}).get(key)
    return number * scale if isinstance(number, (int, float)) else None


def least_bandwidth(rows: Rows) -> float | None:
    """The worst decode attention among those that read a gigabyte or more."""
    shares = [row["pct_bw"] for id, row in rows.items() if id.startswith("attention.decode/") and "pct_bw" in row
              and row["cfg"]["kv_bytes"] >= GIGABYTE]  # fmt: skip
    return min(shares, default=None)


def _host(rows: Rows, end: str, key: str) -> float | None:
    for id, row in rows.items():
        if id.startswith("host/") and id.endswith(f"graphs on/overlap on/B256{end}"):
            return value({id: row}, id, key)
    return None


GOALS: Sequence[Goal] = (
    _decode("qwen3-8b", 1, 4.4), _decode("qwen3-0.6b", 1, 0.95), _decode("qwen3-8b", 64, 7.2),
    _decode("qwen3-8b", 256, 17.4),
    Goal(what="decode attention, KV >= 1 GB", limit=85.0, unit="% of bandwidth", at_least=True, roofline=lambda: 100.0,
         measured=least_bandwidth),
    Goal(what="prefill qwen3-8b 2k", limit=47.0, unit="ms", roofline=lambda: prefill_s(SHAPES["qwen3-8b"], 2048) * 1e3,
         measured=lambda rows: value(rows, "prefill/qwen3-8b/T2048", "us", 1e-3)),
    _workload("qwen3-0.6b", 27.0), _workload("qwen3-8b", 10.0),
    Goal(what="256 requests, over transformers", limit=2.0, unit="x", at_least=True, roofline=lambda: None,
         measured=lambda rows: value(rows, "batching/qwen3-0.6b", "ratio")),
    Goal(what="host a step, 256 sequences", limit=400.0, unit="us", roofline=lambda: None,
         measured=lambda rows: _host(rows, "", "host_us")),
    Goal(what="GPU idle, 256 sequences", limit=3.0, unit="%", roofline=lambda: 0.0,
         measured=lambda rows: _host(rows, "/device", "pct_idle")),
    _decode_in_bytes("qwen3-8b", 1, 2.6), _decode_in_bytes("qwen3-8b", 64, 4.1), _decode_in_bytes("qwen3-8b", 256, 9.5),
)  # fmt: skip


def evaluate(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One dict a goal; `met` is None where it was not measured."""
    by_id = {row["id"]: row for row in rows if row["status"] == "ok"}
    found = []
    for goal in GOALS:
        measured = goal.measured(by_id)
        found.append({"what": goal.what, "limit": goal.limit, "unit": goal.unit, "at_least": goal.at_least,
                      "roofline": goal.roofline(), "measured": measured, "met": goal.met(measured)})  # fmt: skip
    return found
