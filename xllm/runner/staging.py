"""`Staging`: copies an eager step's arrays to the device without waiting for the step before it.

The arrays go through memory that the device copies from by itself (pinned). From other memory a copy is done, or at
least begun, only when all that was queued before it is: the host would wait for the step before. Two pieces of memory
are used in turn; one is written again when the copies from it are done.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from backends.backend import Backend, Capturer
from xllm.config import EngineConfig
from xllm.runner.row_state import RowState

NUM_PIECES = 2  # of pinned memory: one is copied from while the other is filled
ALIGNMENT_BYTES = 16  # of each array in a piece: enough for any dtype, and for vector loads


class Staging:
    """`put` copies through pinned memory; arrays that do not fit are copied directly, and counted in `num_slow`."""

    def __init__(self, backend: Backend, capturer: Capturer, num_bytes: int):
        """num_bytes: of all arrays of a step."""
        self._device, self._fence = backend.device, capturer.fence
        self._pieces = [backend.allocate_host(num_bytes) for _ in range(NUM_PIECES)]
        self._waits: list[Callable[[], None]] = [lambda: None] * NUM_PIECES
        self._turn = self._end = 0
        self.num_slow = 0  # arrays that did not fit

    def next_step(self) -> None:
        """Begin the arrays of another step, in the other piece of memory; waits until the copies from it are done."""
        if self._end:
            self._waits[self._turn] = self._fence()
            self._turn = (self._turn + 1) % NUM_PIECES
            self._waits[self._turn]()
            self._end = 0

    def put(self, array: np.ndarray) -> Tensor:
        """Queue the copy of an array to the device; the caller may change the array at once."""
        piece, start = self._pieces[self._turn], self._end
        source = torch.from_numpy(np.ascontiguousarray(array))
        if start + source.nbytes > len(piece):
            self.num_slow += 1
            return source.to(self._device)
        self._end = start + -(-source.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        staged = piece[start:start + source.nbytes].view(source.dtype).view(source.shape)
        staged.copy_(source)
        return torch.empty_like(source, device=self._device).copy_(staged, non_blocking=True)


def step_bytes(config: EngineConfig, rows: RowState) -> int:
    """What the arrays of a step take at most: some numbers for each token, a table and some more for each row."""
    num_seqs, num_columns = rows.block_table.shape
    num_tokens = (config.scheduler.max_num_batched_tokens or rows.max_model_len) + num_seqs
    return 4 * (6 * num_tokens + num_seqs * (num_columns + 16)) + 64 * ALIGNMENT_BYTES
