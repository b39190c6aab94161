"""Section `ceilings`: what this device can do at most, measured with what torch has, on random numbers.

Percentages of the other sections are of these: never of a datasheet.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.device import Timing
from benchmarks.gpu.roofline import Work

NUM_NODES = 1000
SMALL_BYTES, LARGE_BYTES = 4096, 64 << 20


def run(bench: Bench) -> None:
    for id, part in PARTS.items():
        bench.attempt(id, 3 * bench.profile.row_s, part, bench, id)


def _note(bench: Bench, **values: float) -> None:
    bench.results.put("ceilings", bench.results.data["ceilings"] | values)


def copy(bench: Bench, id: str) -> None:
    """Bytes read and written; the larger of this and `read` is no fixed denominator, this one is."""
    source = torch.randn(bench.profile.copy_bytes // 4, device=bench.device.torch)
    target = torch.empty_like(source)
    timing = bench.device.measure([lambda: target.copy_(source)], seconds=bench.profile.row_s)
    work = Work(2.0 * source.nbytes, 0.0)
    _note(bench, bandwidth=work.bytes / timing.us * 1e6)
    bench.row(id, timing=timing, work=work, bytes_per_s=work.bytes / timing.us * 1e6)


def read(bench: Bench, id: str) -> None:
    """A reduction, which writes nothing."""
    source = torch.randn(bench.profile.copy_bytes // 4, device=bench.device.torch)
    timing = bench.device.measure([lambda: source.amax()], seconds=bench.profile.row_s)
    _note(bench, read_bandwidth=source.nbytes / timing.us * 1e6)
    bench.row(id, timing=timing, work=Work(source.nbytes, 0.0), bytes_per_s=source.nbytes / timing.us * 1e6)


def _product(bench: Bench, id: str, make: Callable[[int], Callable[[], Any]], key: str, itemsize: int) -> None:
    size = bench.profile.gemm
    timing = bench.device.measure([make(size)], seconds=bench.profile.row_s)
    work = Work(3.0 * size * size * itemsize, 2.0 * size**3)
    _note(bench, **{key: work.flops / timing.us * 1e6})
    bench.row(id, timing=timing, work=work, flops_per_s=work.flops / timing.us * 1e6)


def gemm(bench: Bench, id: str) -> None:
    """bfloat16; float32 in a dry run, since that is what a CPU multiplies fast."""
    dtype, device = torch.bfloat16 if bench.device.is_cuda else torch.float32, bench.device.torch

    def make(size: int) -> Callable[[], Any]:
        x, weight = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        return lambda: F.linear(x, weight)

    _product(bench, id, make, "rate", dtype.itemsize)


def gemm_fp8(bench: Bench, id: str) -> None:
    if not bench.device.is_cuda or torch.cuda.get_device_capability() < (8, 9):
        return bench.absent(id, "not on this device: it multiplies no fp8 numbers")
    device = bench.device.torch

    def make(size: int) -> Callable[[], Any]:
        x, weight = (torch.randn(size, size, device=device).to(torch.float8_e4m3fn) for _ in range(2))
        scale_x, scale_w = torch.rand(size, 1, device=device), torch.rand(1, size, device=device)
        by_row = F.ScalingType.RowWise
        return lambda: F.scaled_mm(x, weight.t(), scale_x, by_row, scale_w, by_row, output_dtype=torch.bfloat16)

    _product(bench, id, make, "rate_fp8", 1)


def gemm_int8(bench: Bench, id: str) -> None:
    """As "w8a8" multiplies: torch has no public name for it."""
    if not bench.device.is_cuda:
        return bench.absent(id, "not on this device: its products of int8 are no matrix unit's")

    def make(size: int) -> Callable[[], Any]:
        x, weight = (torch.randint(-127, 128, (size, size), device=bench.device.torch, dtype=torch.int8)
                     for _ in range(2))  # fmt: skip
        return lambda: torch._int_mm(x, weight.t())

    try:
        _product(bench, id, make, "rate_int8", 1)
    except RuntimeError as error:  # no fault of ours
        bench.absent(id, f"torch does not multiply int8 here: {error}"[:300])


def graph_node(bench: Bench, id: str) -> None:
    """A kernel that does nearly nothing, after another one like it: the least that one more kernel costs in a graph."""
    if not bench.device.is_cuda:
        return bench.absent(id, "not on this device: it captures no graphs")
    number = torch.randn(1, device=bench.device.torch)
    timing = bench.device.measure([lambda: number.mul_(1.0)] * NUM_NODES, seconds=bench.profile.row_s)
    _note(bench, graph_node_us=timing.us)
    bench.row(id, timing=timing)


def transfers(bench: Bench, id: str) -> None:
    """Between pinned host memory and the device: how long 4 KiB take until the host knows; the bandwidth of 64 MiB."""
    if not bench.device.is_cuda:
        return bench.absent(id, "not on this device: its memory is the host's")
    for name, num_bytes in (("4KiB", SMALL_BYTES), ("64MiB", LARGE_BYTES)):
        host = torch.randint(0, 255, (num_bytes,), dtype=torch.uint8).pin_memory()
        memory = host.to(bench.device.torch)
        for way, target, source in (("h2d", memory, host), ("d2h", host, memory)):
            timing = _waited_for(bench, partial(target.copy_, source, non_blocking=True))
            _note(bench, **{f"{way}_{name}_us": timing.us})
            bench.row(f"{id}/{way}/{name}", timing=timing, bytes_per_s=num_bytes / timing.us * 1e6)


def _waited_for(bench: Bench, call: Callable[[], Any]) -> Timing:
    """By the host's clock, from the call to the end of an event behind it."""
    samples = []
    for _ in range(50):
        event = torch.cuda.Event()
        began = time.perf_counter()
        call()
        event.record()
        event.synchronize()
        samples.append((time.perf_counter() - began) * 1e6)
    return Timing.of(samples)


PARTS: dict[str, Callable[[Bench, str], None]] = {
    "copy": copy, "read": read, "gemm": gemm, "gemm_fp8": gemm_fp8, "gemm_int8": gemm_int8,
    "graph_node": graph_node, "transfers": transfers,
}  # fmt: skip
