"""Section `micro`: each operator's time at the sizes of real models, as a share of the measured ceilings.

Inputs are random and rotate through more memory than the L2 cache holds; on a GPU the calls lie in one captured graph.
"""

from __future__ import annotations

import torch

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.device import Timing
from benchmarks.gpu.micro_cases import MicroCase, all_cases

ROOM = 12  # of the free memory: inputs are made in float32, and then copied to where they are read


@torch.inference_mode()
def run(bench: Bench) -> None:
    for case in all_cases(bench.device, bench.profile):
        bench.attempt(case.id, 4 * bench.profile.row_s, _measure, bench, case)


def _measure(bench: Bench, case: MicroCase) -> None:
    if case.num_bytes > bench.device.free_bytes() // ROOM:
        return bench.absent(case.id, f"does not fit: {case.num_bytes} bytes")
    count = bench.device.num_rotated(case.num_bytes)
    timing = bench.device.measure(case.calls(count), seconds=bench.profile.row_s)
    facts = {} if case.reference is None else _reference(bench, case, count, timing)
    bench.row(case.id, timing=timing, work=case.work, cfg=case.cfg | {"rotated": count}, **facts)


def _reference(bench: Bench, case: MicroCase, count: int, timing: Timing) -> dict[str, object]:
    """The yardstick's time at the same size; that it fails is no fault of ours."""
    assert case.reference is not None
    name, make = case.reference
    try:
        ref_us = bench.device.measure(make(count), seconds=bench.profile.row_s).us
    except RuntimeError as error:
        return {"ref": name, "ref_error": str(error)[:200]}
    return {"ref": name, "ref_us": ref_us, "pct_ref": 100 * ref_us / timing.us}
