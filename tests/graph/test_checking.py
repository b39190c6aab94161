"""The checking capturer: a right step passes, and each way to be wrong is found by its name."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from graph.checking import CheckingCapturer, GraphCheckError, poison, poisoned
from tests.graph.steps import TABLE_VD, WEIGHT_DD, Lookup, compute, expected, make_set

IDS = [3, 1, 4]


class Session:
    """One program, captured with a first step."""

    def __init__(self, function: Callable[[Lookup], None] | None = None, *, size: int = 4, ids: list[int] = IDS,
                 inputs: tuple[str, ...] = ("ids", "scale"), capturer: CheckingCapturer | None = None):
        self.capturer = capturer or CheckingCapturer()
        self.pool = self.capturer.make_pool()
        self.step = Lookup(make_set(), size, function, inputs)
        self.load(ids)
        self.graph = self.capturer.capture(self.step, pool=self.pool, memory=self.step.memory)

    def load(self, ids: list[int]) -> None:
        self.step.fill(ids)
        self.step.memory.upload()

    def replay(self, ids: list[int]) -> Tensor:
        self.load(ids)
        self.graph.replay()
        return self.step.result()


def test_a_right_step_passes() -> None:
    session = Session()
    session.graph.replay()
    assert torch.equal(session.step.result(), expected(IDS))
    for ids in ([1], [2, 2, 2, 2], [10, 0]):
        assert torch.equal(session.replay(ids), expected(ids))
    assert session.capturer.num_replays == 4
    assert session.graph.num_bytes >= 3 * 4 * 5 * 4  # three activations of the bucket


@pytest.mark.parametrize("name", ["ids", "result"])
def test_a_moved_buffer(name: str) -> None:
    session = Session()
    memory = session.step.memory
    tensors = memory.inputs if name in memory.inputs else memory.outputs
    tensors[name] = tensors[name].clone()
    with pytest.raises(GraphCheckError, match=f"{name} has moved"):
        session.graph.replay()


def test_a_tensor_that_is_new_each_time() -> None:
    """As if metadata were rebuilt for every step: the graph would go on reading the first one."""
    scales: list[Tensor] = []

    def wrong(step: Lookup) -> None:
        scales.append(torch.from_numpy(np.full(4, 2.0, dtype=np.float32)))
        step.memory.outputs["result"].copy_(TABLE_VD[step.memory.inputs["ids"]] * scales[-1][:, None] @ WEIGHT_DD)

    with pytest.raises(GraphCheckError, match="not there at the capture"):
        Session(wrong).graph.replay()


def test_an_input_that_was_not_filled() -> None:
    session = Session()
    session.graph.replay()
    session.step.memory.fill("ids", np.array(IDS, dtype=np.int32))
    session.step.memory.upload()
    with pytest.raises(GraphCheckError, match="scale was not filled"):
        session.graph.replay()


def test_an_input_that_was_filled_but_not_uploaded() -> None:
    session = Session()
    session.graph.replay()
    session.step.fill(IDS)
    with pytest.raises(GraphCheckError, match="ids was not filled"):
        session.graph.replay()


def test_an_input_that_was_filled_in_part() -> None:
    session = Session()
    session.graph.replay()
    session.step.fill(IDS)
    session.step.memory.host_array("ids")[3] = session.step.memory.host_array("ids")[3]
    session.step.memory.hosts["ids"][3:].fill_(0x7FC0DEAD)  # what the last replay left in the padding
    session.step.memory.upload()
    with pytest.raises(GraphCheckError, match="ids was not filled"):
        session.graph.replay()


def test_columns_that_no_row_needs_may_hold_anything() -> None:
    session = Session(inputs=("ids", "scale", "table"), function=lambda step: compute(step))
    for width in (1, 4, 2):
        session.step.memory.fill("table", np.ones((3, width), np.int32))
        assert torch.equal(session.replay(IDS), expected(IDS))
    with pytest.raises(GraphCheckError, match="table was not filled"):
        session.replay(IDS)


def test_a_row_that_was_not_written() -> None:
    def wrong(step: Lookup) -> None:
        step.memory.outputs["result"][:2].copy_(torch.embedding(TABLE_VD, step.memory.inputs["ids"])[:2])

    with pytest.raises(GraphCheckError, match="result: a row was not written"):
        Session(wrong)


def test_memory_that_nobody_initialised() -> None:
    def wrong(step: Lookup) -> None:
        rows_TD = torch.empty_like(step.memory.outputs["result"])
        rows_TD[1:] = torch.embedding(TABLE_VD, step.memory.inputs["ids"])[1:]
        step.memory.outputs["result"].copy_(rows_TD)

    with pytest.raises(GraphCheckError, match="a row was not written, or holds memory that never was"):
        Session(wrong)


@pytest.mark.parametrize("how", ["mean", "prefix", "neighbour", "largest"])
def test_a_padding_row_that_leaks(how: str) -> None:
    def leak(rows_TD: Tensor) -> Tensor:
        if how == "mean":
            return rows_TD - rows_TD.mean(0)
        if how == "largest":  # NaN in padding is seen though it never reaches the result
            return rows_TD * (rows_TD.max() < 2.0)
        return rows_TD.flip(0).cumsum(0).flip(0) if how == "prefix" else rows_TD + rows_TD.roll(-1, 0)

    def wrong(step: Lookup) -> None:
        rows_TD = torch.embedding(TABLE_VD, step.memory.inputs["ids"])
        step.memory.outputs["result"].copy_(leak(rows_TD))

    session = Session(wrong)
    session.replay([1, 2, 3, 4])  # without padding there is nothing to leak
    with pytest.raises(GraphCheckError, match="padding leaked"):
        session.replay(IDS)


def test_memory_of_an_index_that_is_used_again() -> None:
    """What lies where an index lay before is no lookup, though one of its axes is as long as the step."""
    def right(step: Lookup) -> None:
        rows_TD = torch.embedding(TABLE_VD, step.memory.inputs["ids"])
        masks = [step.memory.inputs["ids"] == place for place in range(100)]
        del masks
        columns_DT = rows_TD.T.contiguous()
        for _ in range(20):
            columns_DT[:4] = columns_DT[:4].clone() * 1.0  # as many columns as tokens
        step.memory.outputs["result"].copy_(columns_DT.T)

    session = Session(right)
    assert torch.equal(session.replay(IDS), torch.embedding(TABLE_VD, torch.tensor(IDS)))


def test_a_tensor_kept_from_the_last_replay() -> None:
    """What a graph allocates is overwritten by the next one that shares its pool."""
    kept: list[Tensor] = []

    def wrong(step: Lookup) -> None:
        rows_TD = torch.embedding(TABLE_VD, step.memory.inputs["ids"])
        kept.append(rows_TD)
        step.memory.outputs["result"].copy_(kept[0])

    session = Session(wrong)
    with pytest.raises(GraphCheckError, match="not there at the capture"):
        session.graph.replay()
    assert poisoned(kept[0])


def test_a_number_that_the_host_reads() -> None:
    def wrong(step: Lookup) -> None:
        compute(step)
        step.memory.inputs["ids"].sum().item()

    with pytest.raises(GraphCheckError, match="cannot give a number to the host"):
        Session(wrong)


def test_a_step_that_looks_at_the_host() -> None:
    """Its operators depend on what a graph does not see: the capture would be replayed for every step alike."""
    def wrong(step: Lookup) -> None:
        compute(step)
        if step.memory.num_live["T"] == 1:
            step.memory.outputs["result"].neg_()

    session = Session(wrong)
    with pytest.raises(GraphCheckError, match=r"operators, and \d+ at the capture"):
        session.replay([2])

    def also_wrong(step: Lookup) -> None:
        compute(step)
        result = step.memory.outputs["result"]
        _ = result.neg_() if step.memory.num_live["T"] == 1 else result.abs_()

    session = Session(also_wrong)
    with pytest.raises(GraphCheckError, match=r"operator \d+ is aten"):
        session.replay([2])


def test_a_released_graph() -> None:
    session = Session()
    session.graph.release()
    with pytest.raises(GraphCheckError, match="released"):
        session.graph.replay()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32,
                                   torch.int64, torch.uint8], ids=str)
def test_poison_is_told_from_numbers(dtype: torch.dtype) -> None:
    tensor = torch.zeros(3, 4, dtype=dtype)
    assert not poisoned(tensor)
    if dtype.is_floating_point:
        tensor[:] = float("nan")
        assert not poisoned(tensor)
    poison(tensor[1:2, 2:])
    assert poisoned(tensor)
    assert not poisoned(tensor[:, :2])
    if dtype.is_floating_point:
        assert tensor[1, 3].isnan()


class Exchanging:
    """A step that exchanges something twice with other ranks. did: how, each time."""

    def __init__(self) -> None:
        self.names, self.did = ["sum", "gather"], list[str]()
        self.capturer = CheckingCapturer()
        self.session = Session(self.run, capturer=self.capturer)

    def run(self, step: Lookup) -> None:
        compute(step)
        for name in self.names:
            self.exchange(name)

    def exchange(self, name: str) -> None:
        made = torch.zeros(1)  # an operator of the graph, unlike those that an exchange is made of
        self.capturer.exchange(name, lambda: self._note("made", made), lambda: self._note("stood in", made))

    def _note(self, what: str, tensor: Tensor) -> None:
        for _ in what:  # more operators for the one than for the other
            tensor.add_(1.0)
        self.did.append(what)


def test_exchanges_are_made_in_a_replay_and_not_in_a_capture() -> None:
    exchanging = Exchanging()
    assert exchanging.did == ["stood in"] * 2
    exchanging.session.replay([1, 2, 3, 4])
    assert exchanging.did[2:] == ["made"] * 2 and exchanging.capturer.exchanges == ["sum", "gather"]
    exchanging.exchange("sum")  # of an eager step
    assert exchanging.did[4:] == ["made"]


@pytest.mark.parametrize("names", [["sum"], ["gather", "sum"], ["sum", "gather", "sum"]], ids=str)
def test_other_exchanges_than_those_of_the_capture(names: list[str]) -> None:
    exchanging = Exchanging()
    exchanging.names = names
    with pytest.raises(GraphCheckError, match="at the capture"):
        exchanging.session.replay([1])


def test_an_exchange_outside_of_the_function_that_is_replayed() -> None:
    exchanging = Exchanging()
    with pytest.raises(GraphCheckError, match="sum while attention is planned: a replay would not make it"), \
            exchanging.capturer.no_exchange("attention is planned"):
        exchanging.exchange("sum")
    exchanging.session.replay([1])  # and then as before
    raised: list[BaseException] = []

    def elsewhere() -> None:
        try:
            exchanging.exchange("sum")
        except GraphCheckError as error:
            raised.append(error)

    def run(step: Lookup) -> None:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        exchanging.run(step)

    exchanging.session.step.function = run
    exchanging.session.replay([1, 2, 3, 4])
    assert "in another thread, during a replay" in str(raised[0]) and len(raised) == 1
