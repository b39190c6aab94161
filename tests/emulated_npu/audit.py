"""What torch's allocator thinks of the memory that a captured model uses."""

from __future__ import annotations

from collections.abc import Iterable

import torch_npu

from tests.emulated_npu.tensors import Range

NO_POOL = (0, 0)


def freed_by_allocator(ranges: Iterable[Range]) -> Range | None:
    """Memory that is held free outside the pools of graphs, where anyone may be given it: an input that died, or
    something allocated during the capture but not for it. In a graph's pool what is free is the graph's own.
    """
    free = [
        (block["address"], block["address"] + block["size"])
        for segment in torch_npu.npu.memory_snapshot()
        if tuple(segment.get("segment_pool_id", NO_POOL)) == NO_POOL
        for block in segment["blocks"]
        if block["state"] != "active_allocated"
    ]
    for start, size in ranges:
        if any(start < end and begin < start + size for begin, end in free):
            return (start, size)
    return None
