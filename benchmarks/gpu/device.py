"""`Device`: where things run and how their time is taken. A CPU stands in for a GPU in dry runs.

On a GPU time is taken by events on the stream, and many calls are replayed as one captured graph, which leaves the
launches out. On a CPU calls are made one after the other and the clock is read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from backends import get_backend
from backends.backend import Backend
from benchmarks.gpu.roofline import H200, Ceilings
from xllm import env

Call = Callable[[], Any]
LEAST_SAMPLES = 5
ROTATED_L2 = 3  # inputs are rotated through that many times the L2 cache


@dataclass(frozen=True)
class Timing:
    """us: median of all samples. again_us: medians of the first and of the second half, the same version measured
    twice. spread_us: the larger of their difference and of half the distance between the 10th and 90th percentile."""

    us: float
    again_us: tuple[float, float]
    spread_us: float
    samples: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        half, ordered = len(samples) // 2, sorted(samples)
        first, second = median(samples[:half] or samples), median(samples[half:])
        tenth = len(ordered) // 10
        width = ordered[-1 - tenth] - ordered[tenth]
        return cls(median(samples), (first, second), max(abs(first - second), width / 2), len(samples))


class Device:
    """kind: "cuda" or "cpu". backend: another than the kind's own. Raises BackendError where it cannot run."""

    def __init__(self, kind: str, backend: Backend | None = None):
        self.kind = kind
        self.backend: Backend = backend or get_backend(kind, cache_dir=env.cache_dir())
        self.torch: torch.device = self.backend.device

    @property
    def is_cuda(self) -> bool:
        return self.kind == "cuda"

    @property
    def l2_bytes(self) -> int:
        return int(torch.cuda.get_device_properties(self.torch).L2_cache_size) if self.is_cuda else 1 << 20

    def free_bytes(self) -> int:
        return self.backend.available_memory_bytes()

    def fixed_ceilings(self) -> Ceilings | None:
        """Of a kind of device whose ceilings are written down, so that numbers of different runs compare."""
        return H200 if self.is_cuda and "H200" in torch.cuda.get_device_name(self.torch) else None

    def synchronize(self) -> None:
        self.backend.synchronize()

    def is_usable(self) -> bool:
        """Whether it still answers."""
        try:
            torch.ones(1, device=self.torch).add_(1)
            self.synchronize()
            return True
        except RuntimeError:
            return False

    def generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.torch).manual_seed(seed)

    def release_memory(self) -> None:
        """Give back what torch keeps of freed memory."""
        import gc

        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()

    def once(self, call: Call) -> float:
        """Microseconds of one call, begun on an idle device and waited for, by the host's clock."""
        self.synchronize()
        began = time.perf_counter()
        call()
        self.synchronize()
        return (time.perf_counter() - began) * 1e6

    def measure(self, calls: Sequence[Call], *, seconds: float) -> Timing:
        """One call's time, with `calls` (the same work on different memory) taking turns."""
        for call in calls:
            call()
        alone_us = self.once(lambda: [call() for call in calls]) / len(calls)
        rounds = max(1, min(64, int(1000 / max(alone_us * len(calls), 1e-3))))  # a millisecond each sample
        replay = self._graph([*calls] * rounds) if self.is_cuda else lambda: [call() for call in [*calls] * rounds]
        num_samples = int(seconds * 1e6 / max(alone_us * len(calls) * rounds, 1e-3))
        num_samples = max(LEAST_SAMPLES, min(1000, num_samples))
        samples = self._samples(replay, num_samples)
        return Timing.of([sample / (len(calls) * rounds) for sample in samples])

    def measure_waited(self, calls: Sequence[Call], *, seconds: float) -> Timing:
        """Likewise of calls that no graph may hold: by the host's clock, each waited for, copies as well."""
        def one(call: Call) -> None:
            call()
            self.backend.synchronize_copies()

        for call in calls:
            self.once(partial(one, call))
        samples, until = list[float](), time.perf_counter() + seconds
        while len(samples) < LEAST_SAMPLES or (time.perf_counter() < until and len(samples) < 1000):
            samples += [self.once(partial(one, call)) for call in calls]
        return Timing.of(samples)

    def _samples(self, call: Call, count: int) -> list[float]:
        call()  # the first replay also uploads the graph
        if not self.is_cuda:
            return [self.once(call) for _ in range(count)]
        marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
        for begin, end in marks:
            begin.record()
            call()
            end.record()
        self.synchronize()
        return [begin.elapsed_time(end) * 1e3 for begin, end in marks]

    def _graph(self, calls: Sequence[Call]) -> Call:
        stream, graph = torch.cuda.Stream(self.torch), torch.cuda.CUDAGraph()
        self.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
        return graph.replay

    def num_rotated(self, bytes_per_call: int, limit_bytes: int = 8 << 30) -> int:
        """How many sets of inputs are more than the caches hold."""
        wanted = -(-ROTATED_L2 * self.l2_bytes // max(bytes_per_call, 1)) + 1
        most = 64 if self.is_cuda else 4
        return int(max(1, min(wanted, most, limit_bytes // max(bytes_per_call, 1))))


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory from `torch.empty` is filled with NaN (integers: the largest), so that an unwritten output shows."""
    import warnings

    mode = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    # torch.use_deterministic_algorithms would import torch's compiler: seconds, for a flag that is not of interest.
    torch._C._set_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch._C._set_deterministic_algorithms(mode, warn_only=warn_only)


def relative_error(out: Tensor, truth: Tensor) -> float:
    """|out - truth| / |truth| in float64; NaN anywhere gives NaN, and 0 / 0 is 0."""
    difference = (out.double() - truth.double()).norm()
    return float(difference / truth.double().norm().clamp_min(1e-300)) if truth.numel() else 0.0
