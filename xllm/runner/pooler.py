"""`Pooler`: vectors for rows that ask for an embedding, gathered chunk by chunk.

Such a row is a request for one token like any other; its vector is made of the hidden states on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from xllm.pooling import PoolingParams
from xllm.runner.batch import HostBatch
from xllm.runner.row_state import RowState
from xllm.step import NewRow, ScheduleOutput


class Pooler:
    """Accumulates the vectors of rows that ask for an embedding. Sums are fp64, on the device that computes them."""

    def __init__(self, rows: RowState, layers: Sequence[Callable[[Tensor], Tensor]] = ()):
        """layers: what a vector passes through in host memory, fp32."""
        self._rows, self._layers = rows, layers
        self._kept: dict[int, Tensor] = {}  # by row, of the chunks so far: sum, largest, or first

    def enter(self, new: NewRow) -> None:
        """Goes with `RowState.enter`."""
        self._kept.pop(new.row, None)

    def pool(self, plan: ScheduleOutput, batch: HostBatch, hidden_TD: Tensor) -> dict[int, np.ndarray]:
        """Take in a step's hidden states, before the rows advance; returns the fp32 vectors of the rows whose text ends
        with this step, by their index in the plan."""
        found = {}
        for i in np.flatnonzero(self._rows.pools[plan.rows_S]).tolist():
            row = int(plan.rows_S[i])
            params = self._rows.pooling[row]
            if params is None or self._rows.num_computed[row] >= self._rows.num_prompt_tokens[row]:
                continue
            chunk_TD = hidden_TD[batch.query_start_S1[i]:batch.query_start_S1[i + 1]]
            self._take_in(row, params.kind, chunk_TD)
            if plan.samples_S[i]:
                found[i] = self._finish(row, params)
        return found

    def _take_in(self, row: int, kind: str | None, chunk_TD: Tensor) -> None:
        kept_D = self._kept.get(row)
        if kind == "last":
            self._kept[row] = chunk_TD[-1].clone()  # the next step may write over it
        elif kind == "cls":
            self._kept[row] = chunk_TD[0].clone() if kept_D is None else kept_D
        elif kind == "max":
            largest_D = chunk_TD.amax(dim=0)
            self._kept[row] = largest_D if kept_D is None else torch.maximum(largest_D, kept_D)
        else:
            total_D = self._summed(row, kind, chunk_TD)
            self._kept[row] = total_D if kept_D is None else total_D + kept_D

    def _summed(self, row: int, kind: str | None, chunk_TD: Tensor) -> Tensor:
        if kind != "weightedmean":
            return chunk_TD.sum(dim=0, dtype=torch.float64)
        first = int(self._rows.num_computed[row]) + 1
        weights_T = torch.arange(first, first + len(chunk_TD), dtype=torch.float64, device=chunk_TD.device)
        return weights_T @ chunk_TD.double()

    def _finish(self, row: int, params: PoolingParams) -> np.ndarray:
        vector_D, count = self._kept.pop(row).double(), int(self._rows.num_prompt_tokens[row])
        divisors = {"mean": float(count), "mean_sqrt_len_tokens": count**0.5, "weightedmean": count * (count + 1) / 2}
        vector_D = vector_D / divisors.get(params.kind or "", 1.0)
        if self._layers:
            vector_D = vector_D.float().cpu()
            for layer in self._layers:
                vector_D = layer(vector_D)
            vector_D = vector_D.double()
        vector_D = vector_D[:params.dimensions]
        if params.normalize:
            vector_D = vector_D / vector_D.norm().clamp(min=1e-12)
        vector: np.ndarray = vector_D.float().cpu().numpy()
        return vector
