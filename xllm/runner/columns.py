"""What `OpSet.sample` reads beside the logits: the columns of `request.py:SAMPLING_COLUMNS`, and a uniform number.

Letters: Q slots to sample.
"""

from __future__ import annotations

import numpy as np

from xllm.request import SAMPLING_COLUMNS, Column
from xllm.runner.row_state import RowState
from xllm.runner.uniform import uniforms

# In the order of `OpSet.sample`.
SAMPLE_INPUTS = {**SAMPLING_COLUMNS, "uniform": Column("float32", 0.0)}


def sampling_columns(rows: RowState, rows_Q: np.ndarray, offsets_Q: np.ndarray) -> dict[str, np.ndarray]:
    """Values of SAMPLE_INPUTS for the slots (see `HostBatch`), in its order, each [Q]."""
    found = {name: column[rows_Q] for name, column in rows.columns.items()}
    found["uniform"] = uniforms(rows.seed[rows_Q], rows.num_tokens[rows_Q] + offsets_Q)
    return found
