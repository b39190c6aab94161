"""Memory that was never written, and memory that a graph uses though nobody keeps it for the graph."""

from __future__ import annotations

import pytest
import torch

from tests.emulated_npu.install import machine
from tests.npu.test_emulator_capture import DEVICE, captured, ones, side_stream


@pytest.fixture
def audits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine(), "audits", True)


@pytest.mark.parametrize("order", [None, "1"])
def test_uninitialised_memory_is_poison(order: str | None) -> None:
    machine().set_order(order)
    for made in (torch.empty(3, device=DEVICE), torch.empty_like(ones(3)), ones(3).new_empty(3)):
        assert made.isnan().all()
    assert (torch.empty(3, dtype=torch.int32, device=DEVICE) < -(10**8)).all()
    assert (torch.empty(3, dtype=torch.uint8, device=DEVICE) == 0xA5).all()
    assert torch.zeros(3, device=DEVICE).tolist() == [0.0] * 3
    assert torch.empty(2, 3, 4, 5, device=DEVICE, memory_format=torch.channels_last).stride() == (60, 1, 15, 3)


def test_memory_is_poisoned_when_it_is_reused() -> None:
    x = ones(1000)
    address = x.data_ptr()
    del x
    again = torch.empty(1000, device=DEVICE)
    assert again.data_ptr() == address and again.isnan().all()


def test_a_graph_whose_input_has_died(audits: None, capfd: pytest.CaptureFixture[str]) -> None:
    inputs = [ones(1000)]
    graph, _ = captured(lambda: inputs[0] + 1)
    graph.replay()
    inputs.clear()
    with pytest.raises(RuntimeError, match="507015"):
        graph.replay()
    assert "holds free" in capfd.readouterr().err


def test_memory_allocated_in_a_capture_but_not_for_it(audits: None, capfd: pytest.CaptureFixture[str]) -> None:
    """On another stream than the captured one: it is not the graph's, and with its last name it is anyone's."""
    side = side_stream()

    def function() -> torch.Tensor:
        with torch.npu.stream(side):
            scratch = torch.empty(1000, device=DEVICE)
        return torch.add(ones(1000), 1, out=scratch) * 2

    graph, _ = captured(function, capture_error_mode="relaxed")
    with pytest.raises(RuntimeError, match="507015"):
        graph.replay()
    assert "holds free" in capfd.readouterr().err


def test_a_graph_s_own_memory_is_in_order(audits: None) -> None:
    x, pool = ones(1000), torch.npu.graph_pool_handle()
    graphs = [captured(lambda: (x + 1) * 2 + 3, pool=pool) for _ in range(3)]
    for graph, result in graphs:
        graph.replay()
        assert result[0].item() == 7.0
