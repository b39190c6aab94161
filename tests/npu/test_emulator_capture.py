"""What the emulated device forbids around a capture, each rule with the code that a real one answers."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_npu
from torch import Tensor

from tests.emulated_npu.install import machine

DEVICE = torch.device("npu:0")
N, K, D, BLOCKS, BLOCK = 4, 2, 64, 8, 128


def captured(function: Callable[[], Any], **options: Any) -> tuple[Any, Any]:
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph, **options):
        result = function()
    return graph, result


def capture_fails(function: Callable[[], Any], **options: Any) -> str:
    """The messages of the error in the capture and of the one at its end.

    The wheel leaves the capture's stream current when the end of a capture fails.
    """
    before = torch.npu.current_stream()
    with pytest.raises(RuntimeError) as caught:
        captured(function, **options)
    torch.npu.set_stream(before)
    context = caught.value.__context__
    torch.npu.synchronize()
    return f"{context}\n{caught.value}"


def side_stream() -> torch.npu.Stream:
    """Another stream than the one that captures: the wheel hands out a ring, a new object may be an old stream."""
    side = torch.npu.Stream()
    return torch.npu.Stream() if side == torch.npu.graph.default_capture_stream else side


def ones(*shape: int) -> Tensor:
    return torch.ones(*shape, device=DEVICE)


def test_a_capture_runs_nothing() -> None:
    x, total = ones(4), torch.zeros(4, device=DEVICE)
    graph, (y, index) = captured(lambda: (x * 3, (total.add_(x), torch.ones_like(x, dtype=torch.int32) + 1)[1]))
    assert y.isnan().all() and total.tolist() == [0.0] * 4
    assert (index < -(10**8)).all()  # integers are poisoned, not left as they were
    for times in (1.0, 2.0):
        graph.replay()
        assert y.tolist() == [3.0] * 4 and total.tolist() == [times] * 4 and index.tolist() == [2] * 4


def test_a_replay_reads_addresses() -> None:
    x = ones(4)
    graph, y = captured(lambda: x + 1)
    x.fill_(5.0)
    graph.replay()
    assert y.tolist() == [6.0] * 4
    copy = x.clone()
    x = copy  # the graph does not follow the name
    x.fill_(7.0)
    graph.replay()
    assert y.tolist() == [6.0] * 4


def test_a_capture_keeps_nothing_alive() -> None:
    """An input that is freed makes place for others, and the replay reads those."""
    inputs = [ones(1000)]
    address = inputs[0].data_ptr()
    graph, y = captured(lambda: inputs[0] + 1)
    inputs.clear()
    other = torch.full((1000,), 41.0, device=DEVICE)
    assert other.data_ptr() == address
    graph.replay()
    assert y[0].item() == 42.0


def test_memory_that_is_gone_at_a_replay() -> None:
    inputs = [ones(5 << 20)]
    graph, _ = captured(lambda: inputs[0].sum())
    inputs.clear()
    gc.collect()
    torch.npu.empty_cache()
    with pytest.raises(RuntimeError, match="507015"):
        graph.replay()


def test_host_numbers_are_baked() -> None:
    x, factor = ones(4), 2.0
    scalar = torch.tensor(3.0)
    graph, y = captured(lambda: x * factor + scalar)
    factor, _ = 9.0, scalar.fill_(9.0)
    graph.replay()
    assert y.tolist() == [5.0] * 4


@pytest.mark.parametrize("mode", ["global", "thread_local"])
@pytest.mark.parametrize(
    "forbidden",
    [
        pytest.param(lambda x: x.sum().item(), id="item"),
        pytest.param(lambda x: x.cpu(), id="to_host"),
        pytest.param(lambda x: x.copy_(torch.zeros(4)), id="to_device"),
        pytest.param(lambda x: x.copy_(torch.zeros(4).pin_memory(), non_blocking=True), id="pinned"),
        pytest.param(lambda x: torch.tensor([1.0], device=DEVICE), id="tensor"),
        pytest.param(lambda x: x.nonzero(), id="nonzero"),
        pytest.param(lambda x: x[torch.tensor([0, 1])], id="host_indices"),
        pytest.param(lambda x: torch.npu.synchronize(), id="synchronize"),
    ],
)
def test_waiting_in_a_capture(mode: str, forbidden: Callable[[Tensor], Any]) -> None:
    x = ones(4)
    message = capture_fails(lambda: (x + 1, forbidden(x)), capture_error_mode=mode)
    assert "107030" in message or "107027" in message
    assert "507903" in message  # the capture is invalid and its end says so


def test_waiting_for_the_captured_stream() -> None:
    assert "107027" in capture_fails(lambda: torch.npu.current_stream().synchronize())


def test_relaxed_captures_let_other_streams_wait() -> None:
    other, x = side_stream(), ones(4)

    def function() -> Tensor:
        y = x + 1
        other.synchronize()
        return y

    graph, y = captured(function, capture_error_mode="relaxed")
    graph.replay()
    assert y.tolist() == [2.0] * 4


@pytest.mark.parametrize("mode", ["global", "thread_local"])
def test_another_thread_may_not_wait_either(mode: str) -> None:
    x, failures = ones(4), []

    def waits() -> None:
        try:
            torch.npu.set_device(0)
            x.cpu()
        except RuntimeError as error:
            failures.append(str(error))

    def function() -> None:
        x.add(1)
        thread = threading.Thread(target=waits)
        thread.start()
        thread.join()

    message = capture_fails(function, capture_error_mode=mode)
    assert failures and "107030" in failures[0] and "507903" in message


def test_the_default_stream_is_not_captured() -> None:
    graph = torch.npu.NPUGraph()
    with pytest.raises(RuntimeError, match="non-default stream"):
        graph.capture_begin()


def test_a_captured_event_cannot_be_asked() -> None:
    event = torch.npu.Event()

    def function() -> None:
        event.record()
        event.query()

    assert "107028" in capture_fails(function)


def test_two_streams_in_one_capture() -> None:
    side, x = side_stream(), ones(4)

    def function() -> Tensor:
        y = x + 1
        side.wait_stream(torch.npu.current_stream())
        with torch.npu.stream(side):
            z = y * 2
        torch.npu.current_stream().wait_stream(side)
        return z + 1

    graph, z = captured(function)
    machine().set_order("3")
    for value in (1.0, 2.0):
        x.fill_(value)
        graph.replay()
        assert z.cpu().tolist() == [2 * value + 3] * 4


def test_a_stream_that_is_not_joined_again() -> None:
    side, x = side_stream(), ones(4)

    def function() -> None:
        y = x + 1
        side.wait_stream(torch.npu.current_stream())
        with torch.npu.stream(side):
            y.mul_(2)

    assert "107025" in capture_fails(function)


def test_waiting_for_work_outside_the_capture() -> None:
    side = side_stream()
    event = torch.npu.Event()
    event.record(side)
    message = capture_fails(lambda: torch.npu.current_stream().wait_event(event))
    assert "107024" in message and "507903" in message


def attention_inputs() -> dict[str, Any]:
    torch.manual_seed(0)
    query, cache = torch.randn(2, N, D).npu(), torch.randn(BLOCKS, BLOCK, K * D).npu()
    return {
        "query": query, "key": cache, "value": cache, "block_size": BLOCK, "input_layout": "TND",
        "block_table": torch.tensor([[1, 2], [3, 4]], dtype=torch.int32).npu(),
        "atten_mask": torch.ones(2048, 2048, dtype=torch.int8).triu(1).npu(),
        "actual_seq_lengths": [1, 2], "num_heads": N, "num_key_value_heads": K, "scale": D**-0.5, "sparse_mode": 3,
    }  # fmt: skip


class Updatable:
    """Attention in a graph whose lengths are given anew for each replay, written by hand as vllm-ascend does."""

    def __init__(self, *, waits: bool = True) -> None:
        self.given, self.waits = attention_inputs(), waits
        self.out = torch.empty(2, N, D, device=DEVICE)
        self.lse = torch.empty(0, device=DEVICE)
        self.event, self.stream = torch.npu.ExternalEvent(), side_stream()
        self.workspace = torch_npu._npu_fused_infer_attention_score_get_max_workspace(
            **self.given, actual_seq_lengths_kv=[1, 1]
        )
        self.graph = torch.npu.NPUGraph()
        with torch.npu.graph(self.graph):
            stream = torch.npu.current_stream()
            if waits:
                self.event.wait(stream)
                self.event.reset(stream)
            torch.npu.graph_task_group_begin(stream)
            self.call([1, 1])
            self.handle = torch.npu.graph_task_group_end(stream)
            self.result = self.out + 1

    def call(self, lens: list[int]) -> None:
        torch_npu.npu_fused_infer_attention_score.out(
            **self.given, actual_seq_lengths_kv=lens, workspace=self.workspace, out=[self.out, self.lse]
        )

    def update(self, lens: list[int]) -> None:
        with torch.npu.stream(self.stream):
            torch.npu.graph_task_update_begin(self.stream, self.handle)
            self.call(lens)
            torch.npu.graph_task_update_end(self.stream)
            if self.waits:
                self.event.record(self.stream)

    def expected(self, lens: list[int]) -> Tensor:
        return torch_npu.npu_fused_infer_attention_score(**self.given, actual_seq_lengths_kv=lens)[0] + 1


def test_lists_change_by_task_update_only() -> None:
    graph = Updatable(waits=False)
    lens = [5, 200]
    graph.graph.replay()
    torch.npu.synchronize()
    assert torch.equal(graph.result, graph.expected([1, 1]))
    graph.update(lens)
    torch.npu.synchronize()
    lens[:] = [7, 7]  # the list was taken when the update was queued
    graph.graph.replay()
    torch.npu.synchronize()
    assert torch.equal(graph.result, graph.expected([5, 200]))


def test_a_replay_waits_for_its_update() -> None:
    graph = Updatable()
    for lens in ([5, 200], [130, 1]):
        graph.graph.replay()
        graph.update(lens)
        torch.npu.synchronize()
        assert torch.equal(graph.result, graph.expected(lens))


def test_a_missed_update_is_a_deadlock(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    graph = Updatable()
    monkeypatch.setattr(machine(), "patience_s", 0.01)
    graph.graph.replay()
    with pytest.raises(RuntimeError, match="507000"):
        torch.npu.synchronize()
    assert "value wait" in capfd.readouterr().err
    graph.update([3, 3])
    torch.npu.synchronize()
    assert torch.equal(graph.result, graph.expected([3, 3]))


def test_an_update_from_another_thread_is_waited_for() -> None:
    graph = Updatable()
    graph.graph.replay()
    thread = threading.Timer(0.05, lambda: (torch.npu.set_device(0), graph.update([9, 9])))
    thread.start()
    torch.npu.synchronize()
    thread.join()
    assert torch.equal(graph.result, graph.expected([9, 9]))


def test_an_update_with_other_operators(capfd: pytest.CaptureFixture[str]) -> None:
    graph = Updatable(waits=False)
    torch.npu.graph_task_update_begin(graph.stream, graph.handle)
    with torch.npu.stream(graph.stream):
        graph.out.add_(1)
    with pytest.raises(RuntimeError, match="107040"):
        torch.npu.graph_task_update_end(graph.stream)


def test_an_update_may_not_allocate() -> None:
    graph = Updatable(waits=False)
    torch.npu.graph_task_update_begin(graph.stream, graph.handle)
    with torch.npu.stream(graph.stream), pytest.raises(RuntimeError, match="allocates its result"):
        torch_npu.npu_fused_infer_attention_score(**graph.given, actual_seq_lengths_kv=[1, 1])
    with pytest.raises(RuntimeError, match="107040"):
        torch.npu.graph_task_update_end(graph.stream)


def test_groups_outside_captures_and_inside_groups() -> None:
    stream = side_stream()
    with pytest.raises(RuntimeError, match="107029"):
        torch.npu.graph_task_group_begin(stream)

    def nested() -> None:
        here = torch.npu.current_stream()
        torch.npu.graph_task_group_begin(here)
        with pytest.raises(RuntimeError, match="107033"):
            torch.npu.graph_task_group_begin(here)
        torch.npu.graph_task_group_end(here)

    captured(nested)
    assert "107033" in capture_fails(lambda: torch.npu.graph_task_group_begin(torch.npu.current_stream()))  # left open


def test_resetting_a_graph_that_runs() -> None:
    graph = Updatable()
    graph.graph.replay()
    graph.graph.reset()  # warns, no more
    machine().drop_all(failure=False)
    with pytest.raises(RuntimeError, match="507015"):
        torch.npu.synchronize()


def test_the_wheel_s_own_updates() -> None:
    given = attention_inputs()
    graph, (out, _) = captured(
        lambda: torch_npu.npu_fused_infer_attention_score(**given, actual_seq_lengths_kv=[1, 1]),
        auto_dispatch_capture=True,
    )
    for lens in ([5, 200], [130, 1]):
        graph.replay()
        graph.update([{"actual_seq_lengths_kv": lens}])
        torch.npu.synchronize()
        assert torch.equal(out, torch_npu.npu_fused_infer_attention_score(**given, actual_seq_lengths_kv=lens)[0])
