"""Static buffers: one piece of memory, addresses that never move, and fills that leave nothing behind."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from graph.buffers import ALIGNMENT_BYTES, Field, StaticBuffers, StepMemory
from tests.graph.steps import CAPACITY, INPUTS, OUTPUTS, allocate, make_set


def test_buckets_share_memory_and_never_move() -> None:
    buffers = make_set()
    small, large = (StepMemory(buffers, ("ids", "table"), ("result",), {"T": n, "S": n}) for n in (2, 64))
    for name in small.inputs:
        assert small.inputs[name].data_ptr() == large.inputs[name].data_ptr()
        assert small.inputs[name].data_ptr() % ALIGNMENT_BYTES == buffers.device_bytes.data_ptr() % ALIGNMENT_BYTES
    assert small.outputs["result"].data_ptr() == large.outputs["result"].data_ptr()
    assert small.inputs["table"].shape == (2, 4) and large.inputs["table"].shape == (64, 4)
    assert small.inputs["table"].is_contiguous()


@given(st.lists(st.tuples(st.integers(1, 64), st.integers(0, 4)), min_size=1, max_size=5), st.data())
def test_what_was_filled_arrives_and_nothing_else(steps: list[tuple[int, int]], data: st.DataObject) -> None:
    """One step after the other through the same memory, against fresh arrays."""
    buffers = make_set()
    for size, width in steps:
        memory = StepMemory(buffers, ("ids", "scale", "table"), (), {"T": size, "S": size})
        rows = data.draw(st.integers(1, size))
        ids = np.arange(rows, dtype=np.int32) + 7
        table = np.arange(rows * width, dtype=np.int32).reshape(rows, width) - 3
        memory.fill("ids", ids)
        memory.fill("scale", ids.astype(np.float32), 0.5)
        memory.fill("table", table, 9, width=2)
        memory.upload()
        assert memory.inputs["ids"].tolist() == ids.tolist() + [0] * (size - rows)
        assert memory.inputs["scale"].tolist() == ids.tolist() + [0.5] * (size - rows)
        expected = np.full((size, max(width, 2)), 9)
        expected[:rows, :width] = table
        assert memory.live_input("table").tolist() == expected.tolist()


def test_only_what_is_used_is_copied() -> None:
    """Fields behind the last one in use, and rows of the table behind the bucket's, stay as they are."""
    buffers = make_set()
    buffers.device_bytes.fill_(77)
    memory = StepMemory(buffers, ("ids", "table"), (), {"T": 3, "S": 3})
    memory.upload()
    assert not memory.inputs["table"].any()
    everything = buffers.view("table", CAPACITY)
    assert (everything[3:].view(torch.uint8) == 77).all()
    StepMemory(buffers, ("ids",), (), {"T": 64, "S": 1})
    ids_only = StepMemory(buffers, ("ids",), (), {"T": 64, "S": 1})
    buffers.device_bytes.fill_(77)
    ids_only.upload()
    assert (buffers.view("scale", CAPACITY).view(torch.uint8) == 77).all()


def test_sets_share_only_what_they_may() -> None:
    shared: dict[str, torch.Tensor] = {}
    outputs = (Field("one", torch.float32, ("T", "D"), shared=True), Field("own", torch.uint8, ("T",)))
    a, b = (StaticBuffers(INPUTS, outputs, CAPACITY, device=torch.device("cpu"), allocate_host=allocate, shared=shared)
            for _ in range(2))
    sizes = {"T": 5, "S": 5}
    assert a.result("one", sizes).data_ptr() == b.result("one", sizes).data_ptr()
    assert a.result("own", sizes).data_ptr() != b.result("own", sizes).data_ptr()
    assert a.device_bytes.data_ptr() != b.device_bytes.data_ptr()
    assert a.result("one", sizes).shape == (5, 5)


def test_live_parts() -> None:
    memory = StepMemory(make_set(), ("ids", "table"), tuple(field.name for field in OUTPUTS), {"T": 8, "S": 4})
    memory.num_live = {"T": 5, "S": 3}
    assert memory.live_output("result").shape == (5, 5)
    assert memory.live_input("table").shape == (4, 4)
    memory.fill("table", np.zeros((3, 1), np.int32))
    assert memory.live_input("table").shape == (4, 1)
    assert memory.live_input("ids").shape == (8,)
