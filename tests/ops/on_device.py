"""`OnDevice`: an op set of a device for tests whose tensors are all in host memory.

Each call copies the memory behind its tensors there and, since an operator may write into it, back: with what lies
between the numbers of a view, so that a cache with gaps keeps them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from backends.expert_choice import ExpertChoice
from backends.metadata import AttentionMetadata
from backends.opset import OpSet
from backends.scaled_weight import ScaledWeight

IN_HOST_MEMORY = {"export_blocks": (1, 2, 3), "import_blocks": (1, 2, 3)}  # arguments that the contract wants there


def on_device(ops: OpSet, device: torch.device, synchronize: Callable[[], None]) -> OpSet:
    """synchronize: waits until all that was queued is done."""

    def carried(name: str, op: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            load, stays = Load(device), IN_HOST_MEMORY.get(name, ())
            there = [x if i in stays else load.there(x) for i, x in enumerate(arguments)]
            result = op(*there, **{key: load.there(x) for key, x in options.items()})
            synchronize()
            load.bring_back()
            if isinstance(result, ExpertChoice):
                return ExpertChoice(result.ids_TK.cpu(), result.weights_TK.cpu())
            return result.cpu() if isinstance(result, Tensor) else result

        return call

    names = [field.name for field in fields(ops) if field.name != "name"]
    return replace(ops, **{name: carried(name, getattr(ops, name)) for name in names})


class Load:
    """The memory behind one call's tensors, in both places."""

    def __init__(self, device: torch.device):
        self.device = device
        self.memory: dict[int, tuple[Tensor, Tensor]] = {}

    def there(self, x: Any) -> Any:
        if isinstance(x, AttentionMetadata):
            return replace(x, **{f.name: self.there(getattr(x, f.name)) for f in fields(x)})
        if isinstance(x, ExpertChoice):  # its order is made anew, and is the same each time
            return ExpertChoice(self._tensor(x.ids_TK), self._tensor(x.weights_TK))
        if isinstance(x, ScaledWeight):
            return ScaledWeight(self._tensor(x.codes_YX), self._tensor(x.scale_YG), x.group)
        if isinstance(x, tuple):  # the parts of a layer's cache, or its experts
            return tuple(map(self.there, x))
        return self._tensor(x) if isinstance(x, Tensor) else x

    def _tensor(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in self.memory:
            here = torch.empty(0, dtype=torch.uint8).set_(storage)
            self.memory[storage.data_ptr()] = here, here.to(self.device, copy=True)
        _, memory = self.memory[storage.data_ptr()]
        empty = torch.empty(0, dtype=x.dtype, device=self.device)
        return empty.set_(memory.untyped_storage(), x.storage_offset(), x.shape, x.stride())

    def bring_back(self) -> None:
        for here, there in self.memory.values():
            here.copy_(there)
