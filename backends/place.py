"""`Place`: which of a machine's devices a process computes on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from backends.backend import BackendError


@dataclass(frozen=True)
class Place:
    """The process number `index` of `count` on this machine that need a device each. Of one, that is torch's current
    device; of several, the device of the same number among those that the process may see."""

    index: int = 0
    count: int = 1

    def take(self, kind: str, module: Any, variable: str) -> torch.device:
        """Make the device current in this thread, and return it; other threads are told it by who uses them.

        kind: "cuda" or "npu". module: torch.cuda or torch.npu. variable: of the environment, which hides devices from
        a process. Raises BackendError where there are fewer devices than processes.
        """
        found = module.device_count()
        if found < self.count:
            raise BackendError(f"{self.count} ranks need {self.count} devices, one each, and torch sees {found} of the "
                               f"kind {kind}: lower tensor_parallel_size, or name more in {variable}")
        if self.count > 1:
            module.set_device(self.index)
        return torch.device(kind, module.current_device())


ALONE = Place()
