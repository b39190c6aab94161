"""Section `baselines`: transformers on the same weights, in processes of their own, at the same work.

`generate`: one sequence, static cache, the step compiled by torch. `batching`: the offline workload by continuous
batching. A baseline that does not run says why: that is no fault of this engine.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.results import ABSENT, OK

PREFIX = "ANSWER "
START_S = 10.0  # to import and to fill the weights


def run(bench: Bench) -> None:
    for name in ("generate", "batching"):
        id = f"{name}/{bench.profile.baseline_model}"
        bench.attempt(id, START_S if bench.device.is_cuda else 0.0, _run, bench, name, id)


def _run(bench: Bench, name: str, id: str) -> None:
    profile = bench.profile
    limit_s = max(1.0, min(profile.baseline_s, bench.left_s - 5.0))
    command = [sys.executable, "-m", "benchmarks.gpu.baseline_worker", name, bench.device.kind, profile.name,
               str(limit_s), str(bench.scratch)]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s + START_S,
                              cwd=Path(__file__).parents[2])  # fmt: skip
    except subprocess.TimeoutExpired:
        return bench.absent(id, f"it had not ended after {limit_s + START_S:.0f} s")
    answers = [line.removeprefix(PREFIX) for line in done.stdout.splitlines() if line.startswith(PREFIX)]
    if not answers:
        return bench.absent(id, f"exit status {done.returncode}: {done.stderr[-1500:]}")
    answer: dict[str, Any] = json.loads(answers[-1])
    answer |= _ratio(bench, name, answer)
    bench.row(id, status=ABSENT if "why" in answer else OK, **answer)


def _ratio(bench: Bench, name: str, answer: dict[str, Any]) -> dict[str, float]:
    """Ours over theirs, in tokens a second, where both are there."""
    model = bench.profile.baseline_model
    ours_id = f"workload/{model}" if name == "batching" else f"decode/{model}/B1/ctx{bench.profile.contexts[0]}"
    ours = [row["tokens_per_s"] for row in bench.results.rows if row["id"] == ours_id and row["status"] == OK]
    return {"ratio": ours[0] / answer["tokens_per_s"]} if ours and answer.get("tokens_per_s") else {}
