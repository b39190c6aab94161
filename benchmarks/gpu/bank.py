"""`MicroCase`: one thing that section `micro` measures, and `Bank`: where its random inputs come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.device import Call, Device
from benchmarks.gpu.roofline import Work


@dataclass(frozen=True, kw_only=True)
class MicroCase:
    """calls(n): the operator over n sets of inputs. reference: likewise a yardstick, and its name. num_bytes: that one
    set takes, by which sets are counted. waited: no graph may hold it. link: the way between device and host memory
    that the work's bytes take, "h2d" or "d2h". rate: the ceiling of its operations, "rate_fp8" or "rate_int8" (where
    that was not measured, the 16-bit one). absent: why there is nothing to call; may_refuse: a ValueError or
    NotImplementedError of the operator says that as well."""

    id: str
    work: Work
    num_bytes: int
    calls: Callable[[int], Sequence[Call]] = lambda count: ()
    cfg: dict[str, Any] = field(default_factory=dict)
    reference: tuple[str, Callable[[int], Sequence[Call]]] | None = None
    waited: bool = False
    link: str | None = None
    rate: str = "rate"
    absent: str = ""
    may_refuse: bool = False


class Bank:
    """Random inputs of the dtype that the device computes in."""

    def __init__(self, device: Device):
        self.device, self.backend, self.ops = device, device.backend, device.backend.ops
        self.dtype = torch.bfloat16 if device.is_cuda else torch.float32
        self.itemsize = self.dtype.itemsize
        self.generator = device.generator(1)
        self._host = torch.empty(0, dtype=torch.uint8)

    def randn(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device.torch).normal_(generator=self.generator)

    def randint(self, high: int, *shape: int) -> Tensor:
        """int32 in [0, high)."""
        return torch.randint(high, shape, generator=self.generator, device=self.device.torch, dtype=torch.int32)

    def logits(self, rows: int, vocab: int) -> Tensor:
        return torch.empty(rows, vocab, device=self.device.torch).normal_(0, 3, generator=self.generator)

    def host_memory(self, num_bytes: int) -> Tensor:
        """The same each time, as far as that is enough: pinning takes long."""
        if len(self._host) < num_bytes:
            self._host = self.backend.allocate_host(num_bytes)
        return self._host[:num_bytes]


def each(one: Callable[[], Call]) -> Callable[[int], list[Call]]:
    """For `MicroCase.calls`: `one` makes one set of inputs, and the call over it."""
    return lambda count: [one() for _ in range(count)]
