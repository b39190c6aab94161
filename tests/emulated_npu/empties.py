"""Uninitialised memory holds NaN, and integers far out of range: whoever reads it before it was written is seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.emulated_npu.kernels import Launcher, current_stream
from tests.emulated_npu.tasks import Kernel
from tests.emulated_npu.tensors import as_meta, device_like, host, poison, range_of

MOST_BYTES = 4 << 20  # more is left as it is, for the sake of the host's memory


class Emptier:
    """`torch.empty` and `empty_like`, and with them whatever makes its result by them. `empty_strided` stays native."""

    def __init__(self, launcher: Launcher):
        self.machine = launcher.machine

    def empty(self, size: Sequence[int], *, device: torch.device | None = None, **given: Any) -> Tensor:
        given.pop("pin_memory", None)
        return self._poisoned(torch.empty(size, device="meta", **given), device)

    def empty_like(self, like: Tensor, *, device: torch.device | None = None, **given: Any) -> Tensor:
        given.pop("pin_memory", None)
        return self._poisoned(torch.empty_like(as_meta(like), **given), device or like.device)

    def _poisoned(self, planned: Tensor, device: torch.device | None) -> Tensor:
        made = device_like(planned, device or torch.device("npu"))
        if made.device.type != "npu" or not 0 < made.numel() * made.element_size() <= MOST_BYTES:
            return made
        alias, stream = host(made), current_stream(made.device)
        if self.machine.is_plain(stream) or stream in self.machine.captures:
            poison(alias)
        elif stream not in self.machine.updates:
            self.machine.submit(stream, Kernel("poison", lambda: poison(alias), [range_of(made)]))
        return made


def replace_empty(launcher: Launcher) -> torch.library.Library:
    emptier = Emptier(launcher)
    library = torch.library.Library("aten", "IMPL")
    library.impl("empty.memory_format", emptier.empty, "PrivateUse1", allow_override=True)
    library.impl("empty_like", emptier.empty_like, "PrivateUse1", allow_override=True)
    return library
