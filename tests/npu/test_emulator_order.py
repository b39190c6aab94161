"""Work that is ordered by luck only comes out wrong: the device runs late, and its streams in any legal order."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from tests.emulated_npu.install import machine
from tests.emulated_npu.tasks import AND, EQ, GEQ, NOR, ValueWait
from tests.emulated_npu.tensors import host
from tests.npu.test_emulator_capture import DEVICE, Updatable, captured

SEEDS = [str(seed) for seed in range(12)]


@pytest.fixture(autouse=True)
def in_any_order() -> Iterator[None]:
    machine().set_order("0")
    yield
    torch.npu.synchronize()


def outcomes(function: Callable[[], bool]) -> set[bool]:
    """Whether it came out right, over many orders."""
    found = set()
    for seed in SEEDS:
        torch.npu.synchronize()
        machine().set_order(seed)
        found.add(function())
    return found


def test_nothing_runs_before_somebody_waits() -> None:
    x = torch.zeros(4, device=DEVICE)
    torch.npu.synchronize()
    x.add_(1)
    event = torch.npu.Event()
    event.record()
    assert not event.query() and not torch.npu.current_stream().query()
    assert host(x).tolist() == [0.0] * 4
    event.synchronize()
    assert event.query() and host(x).tolist() == [1.0] * 4


@pytest.mark.parametrize("waits", [False, True])
def test_a_missing_wait_between_streams(waits: bool) -> None:
    side = torch.npu.Stream()

    def function() -> bool:
        x = torch.zeros(4, device=DEVICE)
        torch.npu.synchronize()
        x.fill_(3)
        if waits:
            side.wait_stream(torch.npu.current_stream())
        with torch.npu.stream(side):
            y = x + 1
        side.synchronize()
        return y.cpu().tolist() == [4.0] * 4

    assert outcomes(function) == {True} if waits else False in outcomes(function)


@pytest.mark.parametrize("waits", [False, True])
def test_reading_pinned_memory_too_early(waits: bool) -> None:
    pinned = torch.zeros(4).pin_memory()

    def function() -> bool:
        pinned.zero_()
        x = torch.ones(4, device=DEVICE) * 2
        pinned.copy_(x, non_blocking=True)
        event = torch.npu.Event()
        event.record()
        if waits:
            event.synchronize()
        return pinned.tolist() == [2.0] * 4

    assert outcomes(function) == {waits}


@pytest.mark.parametrize("waits", [False, True])
def test_reusing_pinned_memory_too_early(waits: bool) -> None:
    pinned = torch.zeros(4).pin_memory()

    def function() -> bool:
        pinned.fill_(1.0)
        x = torch.empty(4, device=DEVICE)
        x.copy_(pinned, non_blocking=True)
        if waits:
            torch.npu.current_stream().synchronize()
        pinned.fill_(9.0)
        return x.cpu().tolist() == [1.0] * 4

    assert outcomes(function) == {waits}


def test_pageable_memory_is_copied_at_once() -> None:
    source = torch.ones(4)
    x = torch.empty(4, device=DEVICE)
    x.copy_(source, non_blocking=True)
    source.fill_(9.0)
    assert x.cpu().tolist() == [1.0] * 4


@pytest.mark.parametrize("waits", [False, True])
def test_an_update_that_overtakes_a_replay(waits: bool) -> None:
    """The arguments of step n + 1 must not be set before the replay of step n has read its own."""
    graph = Updatable(waits=False)
    lens = ([5, 200], [130, 1])
    expected = [graph.expected(each).cpu() for each in lens]

    def function() -> bool:
        results = []
        for each in lens:
            if waits:
                graph.stream.wait_stream(torch.npu.current_stream())
            graph.update(each)
            if waits:
                torch.npu.current_stream().wait_stream(graph.stream)
            graph.graph.replay()
            results.append(graph.result.clone())
        return all(torch.equal(result.cpu(), right) for result, right in zip(results, expected, strict=True))

    assert outcomes(function) == {True} if waits else False in outcomes(function)


def test_the_order_is_drawn_with_the_seed() -> None:
    """Two streams that write the same place: which comes last depends on the seed, and on nothing else."""
    side = torch.npu.Stream()

    def last(seed: str) -> float:
        x = torch.zeros(1, device=DEVICE)
        torch.npu.synchronize()
        machine().set_order(seed)
        with torch.npu.stream(side):
            for _ in range(5):
                x.fill_(1)
        for _ in range(5):
            x.fill_(2)
        torch.npu.synchronize()
        return x.item()

    first = [last(seed) for seed in SEEDS]
    assert set(first) == {1.0, 2.0} and first == [last(seed) for seed in SEEDS]


def test_a_kernel_that_fails_late() -> None:
    cache = torch.zeros(2, 4, device=DEVICE)
    index = torch.tensor([7], device=DEVICE)
    out = cache.index_select(0, index)
    assert out.shape == (1, 4)
    with pytest.raises(RuntimeError, match="507015"):
        torch.npu.synchronize()
    assert cache.sum().item() == 0.0  # told once


def test_results_whose_size_is_in_the_data() -> None:
    x = torch.tensor([0.0, 2.0, 0.0, 3.0], device=DEVICE)
    y = x * 2
    assert y.nonzero().flatten().tolist() == [1, 3] and y[y > 4].tolist() == [6.0]


def test_replays_and_eager_work_together() -> None:
    x = torch.ones(4, device=DEVICE)
    graph, y = captured(lambda: x * 2)

    def function() -> bool:
        totals: list[Tensor] = []
        for value in range(3):
            x.fill_(value)
            graph.replay()
            totals.append(y + 1)
        return [total.cpu()[0].item() for total in totals] == [1.0, 3.0, 5.0]

    assert outcomes(function) == {True}


@pytest.mark.parametrize(
    ("flag", "passing", "blocking"),
    [(GEQ, (5, 6, 5 + 2**62), (4, 0)), (EQ, (5,), (4, 6)), (AND, (1, 4, 7), (2, 8)), (NOR, (1, 0), (2**64 - 1, ~5))],
)
def test_what_a_value_is_waited_for(flag: int, passing: tuple[int, ...], blocking: tuple[int, ...]) -> None:
    word = ctypes.c_uint64()
    wait = ValueWait(ctypes.addressof(word), 5, flag)
    for value in (*passing, *blocking):
        word.value = value
        assert wait.ready(None) == (value in passing)
