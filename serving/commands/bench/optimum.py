"""The best hit rate that any policy could have: Belady's MIN with bypass (Belady 1966), on a tree of prefixes.

A parent is used whenever its child is, so what is needed farthest in the future is always a leaf, or as far as one;
with ties broken by depth the rule evicts leaves only, as every real policy must.
"""

from __future__ import annotations

import heapq

import numpy as np


def optimum(requests: list[np.ndarray], num_blocks: int) -> float:
    """Share of block uses that hit. requests: each one's block numbers (0, 1, ...), root first."""
    next_use = next_uses(requests)
    resident: dict[int, int] = {}  # block -> its next use
    farthest: list[tuple[int, int, int]] = []  # (-next use, -depth, block)
    hits = total = 0
    for blocks, following in zip(requests, next_use):
        ids = blocks.tolist()
        total += len(ids)
        hits += next((i for i, block in enumerate(ids) if block not in resident), len(ids))
        for depth, (block, use) in enumerate(zip(ids, following.tolist())):
            resident[block] = use
            heapq.heappush(farthest, (-use, -depth, block))
        while len(resident) > num_blocks:
            use, _, block = heapq.heappop(farthest)
            if resident.get(block) == -use:
                del resident[block]
    return hits / total if total else 0.0


def next_uses(requests: list[np.ndarray]) -> list[np.ndarray]:
    """For each request's blocks the number of the next request that uses them; one past the last: none."""
    never = len(requests)
    size = 1 + max((int(blocks.max()) for blocks in requests if len(blocks)), default=0)
    upcoming = np.full(size, never, dtype=np.int64)
    found = []
    for number in range(len(requests) - 1, -1, -1):
        blocks = requests[number]
        found.append(upcoming[blocks])
        upcoming[blocks] = number
    return found[::-1]
