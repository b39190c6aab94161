"""`Pooler`: vectors for rows that ask for an embedding, gathered chunk by chunk.

Such a row is a request for one token like any other; its vector is made of the hidden states on the way.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from xllm.pooling import PoolingParams
from xllm.runner.batch import HostBatch
from xllm.runner.rows import RowState
from xllm.step import NewRow, ScheduleOutput


class Pooler:
    """Sums are fp64, on the device that computes them."""

    def __init__(self, rows: RowState):
        self._rows = rows
        self._sums: dict[int, Tensor] = {}  # by row, of the mean's chunks so far

    def enter(self, new: NewRow) -> None:
        """Goes with `RowState.enter`."""
        self._sums.pop(new.row, None)

    def pool(self, plan: ScheduleOutput, batch: HostBatch, hidden_TD: Tensor) -> dict[int, np.ndarray]:
        """Take in a step's hidden states, before the rows advance; fp32 vectors of the rows that end with it, by their
        index in the plan."""
        found = {}
        for i in np.flatnonzero(self._rows.pools[plan.rows_S]).tolist():
            row = int(plan.rows_S[i])
            params = self._rows.pooling[row]
            if params is None or self._rows.num_computed[row] >= self._rows.num_prompt_tokens[row]:
                continue
            chunk_TD = hidden_TD[batch.query_start_S1[i]:batch.query_start_S1[i + 1]]
            if params.kind == "mean":
                self._add(row, chunk_TD)
            if plan.samples_S[i]:
                found[i] = self._finish(row, params, chunk_TD[-1])
        return found

    def _add(self, row: int, chunk_TD: Tensor) -> None:
        total_D = chunk_TD.sum(dim=0, dtype=torch.float64)
        self._sums[row] = total_D + self._sums[row] if row in self._sums else total_D

    def _finish(self, row: int, params: PoolingParams, last_D: Tensor) -> np.ndarray:
        vector_D = last_D.double()
        if params.kind == "mean":
            vector_D = self._sums.pop(row) / int(self._rows.num_prompt_tokens[row])
        vector_D = vector_D[:params.dimensions]
        if params.normalize:
            vector_D = vector_D / vector_D.norm().clamp(min=1e-12)
        vector: np.ndarray = vector_D.float().cpu().numpy()
        return vector
