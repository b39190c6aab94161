"""Uninitialised memory holds NaN, and integers far out of range: whoever reads it before it was written is seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.emulated_npu.kernels import Launcher, current_stream
from tests.emulated_npu.tasks import Kernel
from tests.emulated_npu.tensors import host, poison, range_of

MOST_BYTES = 4 << 20  # more is left as it is, for the sake of the host's memory


def replace_empty(launcher: Launcher) -> torch.library.Library:
    """`torch.empty`, and with it whatever makes its result by it. `empty_strided` stays the wheel's own."""
    machine = launcher.machine

    def empty(
        size: Sequence[int],
        *,
        dtype: torch.dtype | None = None,
        layout: torch.layout | None = None,
        device: torch.device | None = None,
        pin_memory: bool | None = None,
        memory_format: torch.memory_format | None = None,
    ) -> Tensor:
        given: dict[str, Any] = {"memory_format": memory_format} if memory_format is not None else {}
        planned = torch.empty(size, dtype=dtype, layout=layout, device="meta", **given)
        made = torch.empty_strided(size, planned.stride(), dtype=planned.dtype, device=device)
        if not 0 < made.numel() * made.element_size() <= MOST_BYTES:
            return made
        alias, stream = host(made), current_stream(made.device)
        if machine.is_plain(stream) or stream in machine.captures:
            poison(alias)
        elif stream not in machine.updates:
            machine.submit(stream, Kernel("poison", lambda: poison(alias), [range_of(made)]))
        return made

    library = torch.library.Library("aten", "IMPL")
    library.impl("empty.memory_format", empty, "PrivateUse1", allow_override=True)
    return library
