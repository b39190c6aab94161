"""`OneShot`: sums of small tensors over CUDA devices that reach each other's memory, by one kernel of torch's.

Each rank copies its tensor to memory that all ranks have mapped; the kernel waits for the others, adds up what all of
them have there, in the order of ranks, and waits again before the memory may be overwritten. NCCL moves large tensors
with fewer bytes, but takes several times as long for small ones, as decoding has. Written against torch's symmetric
memory (torch.distributed._symmetric_memory, whose interface may change); it has not been run on hardware.
"""

from __future__ import annotations

import logging

import torch
import torch.distributed as dist
from torch import Tensor

_log = logging.getLogger(__name__)

# By the number of ranks: the largest tensor. The numbers are where vLLM's all-reduce of its own goes from one stage to
# two (csrc/custom_all_reduce.cuh); not measured here. With other numbers of ranks each starts with its own addend, and
# sums differ between ranks.
MOST_BYTES = {2: 512 << 10, 4: 512 << 10, 8: 256 << 10}
DTYPES = (torch.float32, torch.bfloat16)  # that the kernel is made for
ALIGNMENT_BYTES = 4  # of a tensor's length


def is_small(num_bytes: int, dtype: torch.dtype, num_ranks: int) -> bool:
    """Whether a sum is to be one kernel's: the same answer on all ranks for the same tensor."""
    return dtype in DTYPES and num_bytes % ALIGNMENT_BYTES == 0 and 0 < num_bytes <= MOST_BYTES.get(num_ranks, 0)


def obstacle(num_ranks: int) -> str:
    """Why the first `num_ranks` CUDA devices that this process sees cannot sum so; empty: they can."""
    if num_ranks not in MOST_BYTES:
        return f"made for {', '.join(map(str, MOST_BYTES))} ranks"
    try:
        import torch.distributed._symmetric_memory
    except ImportError as error:
        return f"torch has no symmetric memory: {error}"
    if not hasattr(torch.ops.symm_mem, "one_shot_all_reduce_out"):
        return "torch has no one_shot_all_reduce_out"
    if torch.cuda.device_count() < num_ranks:
        return f"{torch.cuda.device_count()} CUDA devices here"
    for one in range(num_ranks):
        for other in range(num_ranks):
            if one != other and not torch.cuda.can_device_access_peer(one, other):
                return f"device {one} cannot reach the memory of device {other}"
    return ""


class OneShot:
    """The mapped memory of one group. Used on the current stream; its calls can be captured into graphs."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device, num_ranks: int):
        """Called by all ranks at once. Allocates the memory, and maps the others'."""
        from torch.distributed import _symmetric_memory as symmetric

        self._name, self._num_ranks = group.group_name, num_ranks
        self._memory = symmetric.empty(MOST_BYTES[num_ranks], dtype=torch.uint8, device=device)
        symmetric.rendezvous(self._memory, self._name)

    def takes(self, x: Tensor) -> bool:
        return is_small(x.numel() * x.itemsize, x.dtype, self._num_ranks)

    def all_reduce(self, x: Tensor) -> None:
        """The sum over all ranks, in place. Contiguous."""
        flat = x.view(-1)
        mapped = self._memory.view(x.dtype)[: len(flat)]
        mapped.copy_(flat)
        torch.ops.symm_mem.one_shot_all_reduce_out(mapped, "sum", self._name, flat)
