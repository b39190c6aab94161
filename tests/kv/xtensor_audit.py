"""What an `XTensor` says of blocks and pages, read from its arrays: for tests alone."""

from __future__ import annotations

import numpy as np

from xllm.kv.xtensor import UNMAPPED, XTensor

FREE, ALLOCATED, MAPPED, REUSABLE = range(4)  # as the head of xllm/kv/xtensor.py has them


def block_states(xtensor: XTensor) -> np.ndarray:
    """FREE, ALLOCATED, MAPPED or REUSABLE for each block: int8 [num_blocks]."""
    states = np.full(xtensor.num_blocks, FREE, dtype=np.int8)
    shown = xtensor._shown_GM[:, 1:-1]
    states[shown[shown != UNMAPPED]] = REUSABLE
    owned = np.arange(xtensor.pages_per_row) < xtensor._num_pages_R[:, None]
    states[xtensor._blocks_RM[owned]] = ALLOCATED
    states[xtensor._blocks_RM[owned & xtensor._contiguous_R[:, None]]] = MAPPED
    return states


def shown_at(xtensor: XTensor, pages: list[int]) -> list[int]:
    """The block that each page of the arena shows, UNMAPPED for none."""
    shown = []
    for page in pages:
        group, place = divmod(page - xtensor.num_blocks, xtensor.pages_per_row)
        shown.append(page if group < 0 else int(xtensor._shown_GM[group, place + 1]))
    return shown
