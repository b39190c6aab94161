"""A step small enough to see through: rows of a table looked up by id, times a matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from graph.buffers import Field, StaticBuffers, StepMemory
from graph.key import GraphKey

CAPACITY = {"T": 64, "S": 64, "M": 4, "D": 5}
INPUTS = (Field("ids", torch.int32, ("T",)), Field("scale", torch.float32, ("T",)),
          Field("table", torch.int32, ("S", "M")))
OUTPUTS = (Field("result", torch.float32, ("T", "D")),)

TABLE_VD = torch.linspace(-1.0, 1.0, 11 * 5).view(11, 5)
WEIGHT_DD = torch.linspace(0.3, 2.0, 25).view(5, 5)


def make_set(inputs: Sequence[Field] = INPUTS, outputs: Sequence[Field] = OUTPUTS) -> StaticBuffers:
    return StaticBuffers(inputs, outputs, CAPACITY, device=torch.device("cpu"), allocate_host=allocate)


def allocate(num_bytes: int) -> Tensor:
    return torch.zeros(num_bytes, dtype=torch.uint8)


def key(size: int, ends_with: str = "") -> GraphKey:
    return GraphKey(kind="decode", num_tokens=size, num_seqs=size, ends_with=ends_with)


def expected(ids: Sequence[int], scale: float = 1.0) -> Tensor:
    return (TABLE_VD[list(ids)] * scale) @ WEIGHT_DD


class Lookup:
    """A `Program`: result = table[ids] * scale @ weight. `function`: something else to do, given this."""

    def __init__(self, buffers: StaticBuffers, size: int, function: Callable[[Lookup], None] | None = None,
                 inputs: Sequence[str] = ("ids", "scale")):
        self.memory = StepMemory(buffers, inputs, ("result",), {"T": size, "S": size})
        self.function = function or compute
        self.num_prepared = 0

    def prepare(self) -> None:
        self.num_prepared += 1

    def __call__(self) -> None:
        self.function(self)

    def fill(self, ids: Sequence[int], scale: float = 1.0) -> None:
        """The step of these ids; rows behind them are padding."""
        self.memory.num_live = {"T": len(ids), "S": len(ids)}
        self.memory.fill("ids", np.array(ids, dtype=np.int32))
        if "scale" in self.memory.inputs:
            self.memory.fill("scale", np.full(len(ids), scale, dtype=np.float32))

    def result(self) -> Tensor:
        return self.memory.live_output("result").clone()


def compute(step: Lookup) -> None:
    inputs = step.memory.inputs
    rows_TD = torch.embedding(TABLE_VD, inputs["ids"]) * inputs["scale"][:, None]
    step.memory.outputs["result"].copy_(rows_TD @ WEIGHT_DD)
