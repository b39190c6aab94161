"""How time is taken, and what is made of it."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu import warm_up
from benchmarks.gpu.device import Device
from benchmarks.gpu.host import busy_us, cuda_calls, device_spans, idle_percent
from benchmarks.gpu.online import Life, arrivals
from xllm.request import OutputDelta


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def test_measured_times_are_those_of_the_work() -> None:
    device, x = Device("cpu"), torch.randn(200_000)
    quick, slow = (device.measure([lambda n=n: x[:n].sort()], seconds=0.02) for n in (500, 200_000))
    assert slow.us > 20 * quick.us
    assert quick.us > 0.5


def test_the_device_is_busy_while_any_kernel_runs() -> None:
    spans = [(0.0, 10.0), (5.0, 20.0), (6.0, 7.0), (40.0, 50.0)]
    assert busy_us(spans) == 30.0
    assert idle_percent(spans) == pytest.approx(40.0)
    assert idle_percent(spans[:3]) == 0.0


def test_requests_arrive_at_the_rate_that_is_asked_for() -> None:
    times = arrivals(rate=50.0, seconds=200.0)
    assert len(times) == pytest.approx(10_000, rel=0.03)
    assert times == sorted(times) and times[-1] < 200.0


def event(name: str, begin: float, end: float, kind: torch.autograd.DeviceType) -> SimpleNamespace:
    time_range = SimpleNamespace(start=begin, end=end, elapsed_us=lambda: end - begin)
    return SimpleNamespace(name=name, time_range=time_range, device_type=kind)


def test_the_profilers_events_are_told_apart() -> None:
    host, device = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA
    events = [event("kernel", 5.0, 9.0, device), event("cudaStreamSynchronize", 0.0, 3.0, host),
              event("cudaGraphLaunch", 1.0, 2.0, host), event("cudaGraphLaunch", 4.0, 6.0, host),
              event("aten::add", 0.0, 1.0, host), event("copy", 2.0, 3.0, device)]  # fmt: skip
    assert device_spans(events) == [(2.0, 3.0), (5.0, 9.0)]
    assert cuda_calls(events) == {"cudaStreamSynchronize": (1, 3.0), "cudaGraphLaunch": (2, 3.0)}


def test_a_requests_waits() -> None:
    life = Life(arrival=10.0)
    for now, tokens in ((11.0, []), (12.0, [1]), (12.5, [2]), (13.5, [3, 4])):
        life.note(now, OutputDelta("a", tokens))
    assert (life.first_wait, life.gaps, life.finished) == (2.0, [0.5, 0.5], False)


@pytest.mark.parametrize("index", [0, 1])
def test_what_compiles_kernels_ahead_runs(index: int) -> None:
    assert warm_up.main("cpu", "tiny", index, 2) == 0


def test_what_breaks_while_kernels_are_compiled_stops_nothing(monkeypatch: pytest.MonkeyPatch,
                                                              capsys: pytest.CaptureFixture[str]) -> None:
    done: list[int] = []
    jobs = [("first", lambda: done.append(0)), ("broken", lambda: 1 / 0), ("last", lambda: done.append(2))]
    monkeypatch.setattr(warm_up, "jobs", lambda *_: iter(jobs))
    assert warm_up.main("cpu", "tiny", 0, 1) == 1
    assert done == [0, 2] and "broken: Traceback" in capsys.readouterr().err
