"""Section `ops`: every operator of the op set as the device's backend binds it, against float64 on the device.

Then each operator once more at a real model's sizes, against float64 on the CPU (`spot.py`).

Memory that an operator leaves unwritten is NaN, and so is everything in a cache that it may not read. Each case is run
twice: what differs in one bit is a race.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from backends.opset import OpSet
from benchmarks.gpu import op_cases, op_cases_experts, op_cases_kv, op_cases_latent, op_cases_sampling
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.device import poisoned, relative_error
from benchmarks.gpu.op_cases import Cases, Check, World
from benchmarks.gpu.shapes import SHAPES
from benchmarks.gpu.spot import SPOTS, on_host

REFUSALS = (ValueError, NotImplementedError)
OPERATORS: dict[str, Cases] = (op_cases.OPERATORS | op_cases_experts.OPERATORS | op_cases_kv.OPERATORS
                               | op_cases_latent.OPERATORS | op_cases_sampling.OPERATORS)


def operators() -> Iterator[str]:
    """Of `OpSet`, as it is."""
    return (field.name for field in fields(OpSet) if field.name != "name")


@torch.inference_mode()
def run(bench: Bench) -> None:
    for name in operators():
        if name not in OPERATORS:
            bench.check(name, False, why="no cases: add some to benchmarks/gpu/op_cases*.py")
            continue
        world = World(bench.device, seed=len(name), cases=bench.profile.cases, longest=bench.profile.longest)
        bench.attempt(name, 1.0, _run_operator, bench, name, OPERATORS[name](world))
    for name, cases in SPOTS.items():
        world = World(bench.device, seed=len(name), cases=1, longest=bench.profile.longest)
        shape = SHAPES[bench.profile.models[-1]]
        bench.attempt(f"spot/{name}", 4.0 if bench.device.is_cuda else 0.0, _run_operator, bench, f"spot/{name}",
                      map(on_host, cases(world, shape)))  # fmt: skip


def _run_operator(bench: Bench, name: str, checks: Iterable[Check]) -> None:
    """One row an operator, with the case that came nearest to its tolerance; a row more for each that fails."""
    began, count, worst, shown = time.time(), 0, -1.0, dict[str, Any]()
    for check in checks:
        if check.absent:
            bench.absent(f"{name}/{check.name}", check.absent)
            continue
        bench.require(0.0)
        try:
            err, why = examine(check)
        except REFUSALS as refusal:
            if not check.may_refuse:
                raise
            bench.absent(f"{name}/{check.name}", f"refused: {refusal}"[:500])
            continue
        count += 1
        if why:
            bench.check(f"{name}/{check.name}", False, why=why, err=err)
        elif err / (check.tolerance or 1.0) > worst:
            worst, shown = err / (check.tolerance or 1.0), {"err": err, "tolerance": check.tolerance, "of": check.name}
    if not count:
        return bench.absent(name, "no case could be run")
    bench.row(name, check=True, cases=count, seconds=round(time.time() - began, 2), **shown)


def examine(check: Check) -> tuple[float, str]:
    """(largest relative error, what is wrong or "")."""
    with poisoned():
        first, second = check.run(), check.run()
    truth = check.truth()
    if not all(same_bits(a, b) for a, b in zip(first, second, strict=True)):
        return 0.0, "two runs differ"
    worst = 0.0
    for out, exact in zip(first, truth):
        if out.shape != exact.shape:
            return 0.0, f"shape {tuple(out.shape)}, not {tuple(exact.shape)}"
        if not torch.equal(kinds(out), kinds(exact)):
            return float("nan"), "NaN or inf where a number should be, or a number where nothing was written"
        err = relative_error(*(x.nan_to_num(0.0, 0.0, 0.0) for x in (out, exact)))
        if not err <= check.tolerance:
            return err, f"relative error {err:.3g}, allowed {check.tolerance:.3g}"
        worst = max(worst, err)
    return worst, ""


def kinds(x: Tensor) -> Tensor:
    """0: a number; NaN, inf and -inf have others."""
    return x.isnan() + 2 * x.isinf() * (1 + (x > 0).int()) if x.is_floating_point() else torch.zeros(x.shape)


def same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype is torch.bool:
        return torch.equal(a, b)
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
