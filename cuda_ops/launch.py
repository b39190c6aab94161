"""Every kernel of this package starts here, with numbers from `configs.json`.

The table has one entry per (operator, architecture, bucket of shapes), chosen offline: nothing is tuned while serving,
so that the first step is as fast as the thousandth and a captured graph never holds a trial. `ahead_of_time` compiles
what would be launched, for a device that need not exist. `overridden` tries other numbers than the table's.

The number PDL, where an operator has it: 1 starts its kernels while the one before still runs, up to their first line,
which waits for it (programmatic dependent launch, CUDA programming guide; Hopper and later). A kernel so started
touches no memory before `wait_for_previous`, so that it may follow any other.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# True in a process that runs kernels as Python on CPU tensors (TRITON_INTERPRET=1). Its bfloat16 is raw bits, so that
# kernels compute in fp32 there; compiled, they multiply what they loaded.
INTERPRETED: bool = triton.knobs.runtime.interpret
# Multiprocessors of the interpreter: the least number with which work is split over several programs.
INTERPRETED_SMS = 2
AMPERE, HOPPER = "sm80", "sm90"
Table = dict[str, dict[str, dict[str, dict[str, int]]]]
TABLE: Table = json.loads(Path(__file__).with_name("configs.json").read_text())

_ahead: Compilation | None = None
_instead: dict[str, int] = {}


class Compilation:
    """What `ahead_of_time` yields: each kernel that was asked for, compiled and not launched, and the entries used."""

    def __init__(self, arch: str, num_sms: int):
        self.arch, self.num_sms = arch, num_sms
        self.compiled: list[tuple[str, Any]] = []
        self.entries: set[tuple[str, str, str]] = set()


@contextmanager
def ahead_of_time(arch: str, num_sms: int) -> Iterator[Compilation]:
    """Operators called inside compile their kernels for `arch` and leave their outputs as they are."""
    global _ahead
    _ahead = Compilation(arch, num_sms)
    try:
        yield _ahead
    finally:
        _ahead = None


@contextmanager
def overridden(**numbers: int) -> Iterator[None]:
    """Inside, table entries that have these numbers have these values: to measure and to compile alternatives."""
    global _instead
    before, _instead = _instead, {**_instead, **numbers}
    try:
        yield
    finally:
        _instead = before


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """The first line of a kernel that may be started early; from then on the next one may be, as far as this line."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Queue it on the current stream; an empty grid is no launch."""
    if "PDL" in options:
        options["PDL"] = bool(options["PDL"]) and not INTERPRETED
        if options["PDL"]:
            options["launch_pdl"] = True
    if _ahead is not None:
        _ahead.compiled.append((kernel.__name__, kernel.warmup(*arguments, grid=grid, **options)))
    elif 0 not in grid:
        kernel[grid](*arguments, **options)


@lru_cache
def _device_facts(index: int) -> tuple[str, int]:
    properties = torch.cuda.get_device_properties(index)
    return HOPPER if properties.major >= 9 else AMPERE, properties.multi_processor_count


def device_facts(device: torch.device) -> tuple[str, int]:
    """(architecture whose entries apply, number of multiprocessors)."""
    if _ahead is not None:
        return _ahead.arch, _ahead.num_sms
    if device.type == "cpu":
        return HOPPER, INTERPRETED_SMS
    return _device_facts(torch.cuda.current_device() if device.index is None else device.index)


def config(op: str, bucket: str, like: Tensor) -> dict[str, int]:
    """The entry of `op` for the device of `like`; the bucket "any" stands for those without one of their own."""
    arch = device_facts(like.device)[0]
    bucket = bucket if bucket in TABLE[op][arch] else "any"
    if _ahead is not None:
        _ahead.entries.add((op, arch, bucket))
    entry = TABLE[op][arch][bucket]
    return {name: _instead.get(name, number) for name, number in entry.items()} if _instead else entry
