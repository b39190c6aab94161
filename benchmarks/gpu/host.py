"""Section `host`: what a step costs the host, by phase, and whether the GPU ever waits for it.

Phases are timed around public calls: `Scheduler.schedule` and `update` in the caller's thread, the runner's `prepare`
and `start` (or `run`) wherever the worker calls them. On a GPU the profiler says how long the device was idle between
its first and its last kernel, what the CUDA calls cost, and which of them wait.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.device import Timing
from benchmarks.gpu.driver import Driver, measured_engine
from benchmarks.gpu.engine import SETTLE_STEPS, graph_facts, start_decoding, step_times
from benchmarks.gpu.shapes import SHAPES, ModelShape
from xllm.worker.inline import runner_of

WAITING_CALLS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
QUEUEING_CALLS = ("cudaGraphLaunch", "cudaMemcpyAsync", "cudaLaunchKernel", "cuLaunchKernel", "cuLaunchKernelEx",
                  "cudaLaunchKernelExC", "cudaMemsetAsync", "cudaEventRecord")  # fmt: skip
TRACED_STEPS = 10
HOST_PHASES = ("schedule", "prepare", "start", "update")  # what is the host's own work; the rest is waiting


def run(bench: Bench) -> None:
    shape = SHAPES[bench.profile.models[0]]
    for graphs in ("on", "off"):
        for overlap in (True, False):
            id = f"host/{shape.name}/graphs {graphs}/overlap {'on' if overlap else 'off'}"
            if graphs == "on" and not bench.device.is_cuda:
                bench.absent(id, "not on this device: it captures no graphs")
                continue
            bench.attempt(id, 3.0 if bench.device.is_cuda else 0.0, _run_settings, bench, shape, id, graphs, overlap)


def _run_settings(bench: Bench, shape: ModelShape, id: str, graphs: str, overlap: bool) -> None:
    """All batches and the profiler with the best settings that there are here, else the largest batch alone."""
    best = overlap and graphs == ("on" if bench.device.is_cuda else "off")
    batches = [b for b in bench.profile.batches if b != 8] if best else bench.profile.batches[-1:]
    context, block = bench.profile.contexts[0], bench.device.backend.default_block_size
    tokens = batches[-1] * (context + 6 * bench.profile.host_steps + 2 * block)
    settings = {"graph_mode": "auto" if graphs == "on" else "off", "async_scheduling": overlap}
    with measured_engine(bench, shape, tokens, **settings) as driver:
        for batch in batches:
            start_decoding(driver, batch, context, shape.vocab)
            step_times(driver, SETTLE_STEPS)
            step_us = _time_phases(bench, driver, f"{id}/B{batch}", batch, context)
            if best and bench.device.is_cuda:
                _profile(bench, driver, f"{id}/B{batch}", step_us, keep_trace=batch == batches[-1])
            elif best:
                bench.absent(f"{id}/B{batch}/device", "not on this device: idle time and waiting calls are a GPU's")
            driver.abort_all()


def _time_phases(bench: Bench, driver: Driver, id: str, batch: int, context: int) -> float:
    """The median time of a step in microseconds, which is also in the row."""
    with stopwatches(driver) as spent:
        samples, _ = step_times(driver, bench.profile.host_steps)
    phases = {name: median(times) for name, times in spent.items() if times}
    host_us = sum(us for name, us in phases.items() if name in HOST_PHASES)
    timing = Timing.of(samples)
    bench.row(id, timing=timing, cfg={"B": batch, "context": context}, host_us=host_us, phases_us=phases,
              pct_host=100 * host_us / timing.us, graphs=graph_facts(driver.core.stats()))  # fmt: skip
    return timing.us


@contextmanager
def stopwatches(driver: Driver) -> Iterator[dict[str, list[float]]]:
    """Microseconds of every call of each phase while inside."""
    core, spent = driver.core, defaultdict[str, list[float]](list)
    runner = runner_of(core.link)
    watched = [(core.scheduler, "schedule", "schedule"), (core.scheduler, "update", "update"),
               (runner, "prepare", "prepare"), (core.link, "result", "wait"), (runner, "start", "start")]  # fmt: skip
    for owner, method, phase in watched:
        setattr(owner, method, _timed(getattr(owner, method), spent[phase]))
    try:
        yield spent
    finally:
        for owner, method, _ in watched:
            delattr(owner, method)  # the class's own shows again


def _timed(call: Any, times: list[float]) -> Any:
    def run(*arguments: Any) -> Any:
        began = time.perf_counter()
        result = call(*arguments)
        times.append((time.perf_counter() - began) * 1e6)
        return result

    return run


def _profile(bench: Bench, driver: Driver, id: str, plain_us: float, *, keep_trace: bool) -> None:
    """Idle time and CUDA calls over many steps; a trace of a few is kept as a file. plain_us: of a step without the
    profiler, which slows the host: `pct_idle_plain` is what of that time the device was not busy for."""
    from torch.profiler import ProfilerActivity, profile

    steps, activities = bench.profile.host_steps, [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities) as found:
        samples, tokens = step_times(driver, steps)
        bench.device.synchronize()
    spans, calls = device_spans(found.events()), cuda_calls(found.events())
    if not spans:
        return bench.absent(f"{id}/device", "the profiler saw nothing of the device")
    waiting = {name: calls[name][0] / steps for name in WAITING_CALLS if name in calls}
    queueing = {name: calls[name][1] / steps for name in QUEUEING_CALLS if name in calls}
    busy = busy_us(spans) / steps
    bench.row(f"{id}/device", pct_idle=idle_percent(spans), pct_idle_plain=100 * (1 - busy / plain_us), busy_us=busy,
              kernels=len(spans) / steps, step_us=median(samples), plain_step_us=plain_us, waits_per_step=waiting,
              queueing_us=queueing, steps=steps, tokens=tokens)  # fmt: skip
    if keep_trace:
        with profile(activities=activities) as traced:
            step_times(driver, TRACED_STEPS)
            bench.device.synchronize()
        traced.export_chrome_trace(str(bench.out / "trace.json.gz"))


def device_spans(events: Sequence[Any]) -> list[tuple[float, float]]:
    """(begin, end) in microseconds of everything that ran on the device."""
    return sorted((event.time_range.start, event.time_range.end) for event in events
                  if event.device_type.name == "CUDA"
                  and not getattr(event, "is_user_annotation", False))


def cuda_calls(events: Sequence[Any]) -> dict[str, tuple[int, float]]:
    """How often each call of the runtime was made, and its microseconds in all."""
    found: dict[str, tuple[int, float]] = {}
    for event in events:
        if event.name in (*WAITING_CALLS, *QUEUEING_CALLS):
            count, us = found.get(event.name, (0, 0.0))
            found[event.name] = (count + 1, us + event.time_range.elapsed_us())
    return found


def busy_us(spans: Sequence[tuple[float, float]]) -> float:
    """Length of the union."""
    busy, reached = 0.0, float("-inf")
    for begin, end in spans:
        busy += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return busy


def idle_percent(spans: Sequence[tuple[float, float]]) -> float:
    """Of the time from the first begin to the last end."""
    if not spans:
        return float("nan")
    total = max(end for _, end in spans) - spans[0][0]
    return 100 * (1 - busy_us(spans) / total) if total > 0 else 0.0
