"""Section `micro`: each operator's time at the sizes of real models, as a share of the measured ceilings.

Inputs are random and rotate through more memory than the L2 cache holds; on a GPU the calls lie in one captured graph.
"""

from __future__ import annotations

from typing import TypedDict

import torch

from benchmarks.gpu.bank import MicroCase
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.ceilings import LARGE_BYTES
from benchmarks.gpu.device import Timing
from benchmarks.gpu.micro_cases import all_cases
from benchmarks.gpu.ops import REFUSALS
from benchmarks.gpu.roofline import Ceilings

ROOM = 12  # of the free memory: inputs are made in float32, and then copied to where they are read


class Facts(TypedDict, total=False):
    """What a row says beside its time: of a transfer, and of the yardstick at the same size."""

    link: str
    bytes_per_s: float
    ref: str
    ref_us: float
    ref_error: str
    pct_ref: float


@torch.inference_mode()
def run(bench: Bench) -> None:
    for case in all_cases(bench.device, bench.profile):
        bench.attempt(case.id, 4 * bench.profile.row_s, _measure, bench, case)


def _measure(bench: Bench, case: MicroCase) -> None:
    if case.absent:
        return bench.absent(case.id, case.absent)
    if case.num_bytes > bench.device.free_bytes() // ROOM:
        return bench.absent(case.id, f"does not fit: {case.num_bytes} bytes")
    count = bench.device.num_rotated(case.num_bytes)
    measure = bench.device.measure_waited if case.waited else bench.device.measure
    try:
        timing = measure(case.calls(count), seconds=bench.profile.row_s)
    except REFUSALS as refusal:
        if not case.may_refuse:
            raise
        return bench.absent(case.id, f"refused: {refusal}"[:500])
    facts: Facts = {} if case.reference is None else _reference(bench, case, count, timing)
    if case.link is not None:
        facts |= {"link": case.link, "bytes_per_s": case.work.bytes / timing.us * 1e6}
    bench.row(case.id, timing=timing, work=case.work, cfg=case.cfg | {"rotated": count},
              ceilings=_ceilings(bench, case), **facts)  # fmt: skip


def _ceilings(bench: Bench, case: MicroCase) -> Ceilings | None:
    """The measured ones of what the case uses; None: they were not measured."""
    found, usual = bench.results.data["ceilings"], bench.ceilings
    if usual is None:
        return None
    copy_us = found.get(f"{case.link}_64MiB_us")
    return Ceilings(usual.bandwidth if copy_us is None else LARGE_BYTES / copy_us * 1e6,
                    found.get(case.rate, usual.rate))  # fmt: skip


def _reference(bench: Bench, case: MicroCase, count: int, timing: Timing) -> Facts:
    """The yardstick's time at the same size; that it fails is no fault of ours."""
    assert case.reference is not None
    name, make = case.reference
    try:
        ref_us = bench.device.measure(make(count), seconds=bench.profile.row_s).us
    except RuntimeError as error:
        return {"ref": name, "ref_error": str(error)[:200]}
    return {"ref": name, "ref_us": ref_us, "pct_ref": 100 * ref_us / timing.us}
