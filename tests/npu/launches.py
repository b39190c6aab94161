"""What is queued on the device, by the operators' names, and on which numbers: an operator without a kernel for its
numbers' dtype runs on the device's few CPU cores (AICPU), milliseconds a call. So do sorts, sums and products of int64
and float64 (CANN's `AICORE910B_DTYPE_SUPPORT_LIST`s)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from npu_ops.contract import set_checking

VIEWS = {"view", "slice", "t", "transpose", "unsqueeze", "expand", "detach", "alias", "empty", "new_empty",
         "unsafe_view", "split", "select", "unbind", "lift_fresh"}
COMPUTED = (torch.bool, torch.int8, torch.int32, torch.float16, torch.bfloat16, torch.float32)
# Takes its counts, or its places, in int64: the documentation of grouped products; GatherElements has both on AI cores.
TAKES_INT64 = {"npu_grouped_matmul", "npu_grouped_matmul_swiglu_quant_v2", "gather"}


class Launches(TorchDispatchMode):
    """names: of the operators called, in order. Asserts that each computes with numbers of `COMPUTED`."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1].strip("_")
        if name not in VIEWS:
            self.names.append(name)
            given = [each if isinstance(each, list) else [each] for each in (*args, *(kwargs or {}).values())]
            wrong = {x.dtype for part in given for x in part if isinstance(x, Tensor)}
            wrong -= {*COMPUTED, *([torch.int64] if name in TAKES_INT64 else [])}
            assert not wrong, (name, wrong)
        return func(*args, **(kwargs or {}))


def launches(run: Callable[..., Any], *arguments: Any) -> list[str]:
    """The operators that a call queues."""
    set_checking(False)  # which computes too
    try:
        with Launches() as found:
            run(*arguments)
    finally:
        set_checking(True)
    return found.names
