"""`Sampler`: from logits to tokens, for all slots of a step at once.

Letters: Q slots, V vocabulary. Rows that edit their logits are handled one by one; they are rare.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from backends.opset import OpSet
from xllm.request import TokenLogprobs
from xllm.runner.batch import SampleSlots
from xllm.runner.logit_edits import LogitEdits
from xllm.runner.logprobs import token_logprobs
from xllm.runner.rows import NO_LOGPROBS, RowState
from xllm.runner.uniform import uniforms
from xllm.step import NewRow

NOT_FINITE = "the model's logits are not finite"
EDITED_AWAY = "repetition_penalty is so small that logits are not finite any more"
NO_TOKEN_LEFT = "no token is left after allowed_token_ids, bad_words, logit_bias and min_tokens"


@dataclass(frozen=True, slots=True, kw_only=True)
class Draws:
    """token_ids_Q int64, on the host. logprobs and failed: by slot. A failed slot's token is meaningless."""

    token_ids_Q: np.ndarray
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)


class Sampler:
    """Reads the rows, writes nothing but its own per-row preparations."""

    def __init__(self, ops: OpSet, rows: RowState, vocab_size: int, device: torch.device):
        self._ops = ops
        self._rows = rows
        self._vocab_size = vocab_size
        self._device = device
        self._edits: dict[int, LogitEdits] = {}

    def enter(self, new: NewRow) -> None:
        """Prepare for a row; goes with `RowState.enter`."""
        if LogitEdits.needed(new.sampling):
            self._edits[new.row] = LogitEdits(new.sampling, new.eos_token_ids, self._vocab_size, self._device)

    def release(self, row: int) -> None:
        """Goes with `RowState.release`."""
        self._edits.pop(row, None)

    def draw(self, logits_QV: Tensor, slots: SampleSlots) -> Draws:
        """Draw one token a slot. `logits_QV` fp32 is overwritten.

        Drafts stand behind the known tokens in the row state: those before a slot are its history.
        """
        failed = _blank_not_finite(logits_QV)
        asked = np.flatnonzero(self._rows.num_logprobs[slots.rows] != NO_LOGPROBS)
        raw_XV = logits_QV[torch.from_numpy(asked).to(self._device)] if len(asked) else None
        failed |= self._edit(logits_QV, slots)
        token_ids_Q = self._choose(logits_QV, slots)
        logprobs = {}
        if raw_XV is not None:
            entries = token_logprobs(raw_XV, token_ids_Q[asked], self._rows.num_logprobs[slots.rows[asked]])
            logprobs = dict(zip(asked.tolist(), entries, strict=True))
        return Draws(token_ids_Q=token_ids_Q, logprobs=logprobs, failed=failed)

    def _edit(self, logits_QV: Tensor, slots: SampleSlots) -> dict[int, str]:
        """Apply each row's `LogitEdits`; slots that end up without any token, or with infinite logits, fail."""
        if not self._edits:
            return {}
        rows, failed = self._rows, {}
        num_history_Q = rows.num_tokens[slots.rows] + slots.offsets
        num_output_Q = num_history_Q - rows.num_prompt_tokens[slots.rows]
        edited_Q = rows.edits_logits[slots.rows] | (num_output_Q < rows.min_output_tokens[slots.rows])
        for q in np.flatnonzero(edited_Q).tolist():
            row = int(slots.rows[q])
            logits_V = logits_QV[q]
            self._edits[row].apply(logits_V, rows.token_ids[row, : num_history_Q[q]], int(rows.num_prompt_tokens[row]))
            largest = logits_V.max().item()  # NaN if there is one
            if not math.isfinite(largest):
                failed[q] = NO_TOKEN_LEFT if largest == -math.inf else EDITED_AWAY
                logits_V.zero_()
        return failed

    def _choose(self, logits_QV: Tensor, slots: SampleSlots) -> np.ndarray:
        """Greedy slots by argmax, the others by inverting the CDF at their own uniform number."""
        rows, rows_Q = self._rows, slots.rows
        temperature_Q = rows.temperature[rows_Q]
        if not temperature_Q.any():
            return self._ops.argmax(logits_QV).cpu().numpy()
        uniform_Q = uniforms(rows.seed[rows_Q], rows.num_tokens[rows_Q] + slots.offsets)
        columns = (temperature_Q, rows.top_k[rows_Q], rows.top_p[rows_Q], rows.min_p[rows_Q], uniform_Q)
        return self._ops.sample(logits_QV, *(torch.from_numpy(c).to(self._device) for c in columns)).cpu().numpy()


def _blank_not_finite(logits_QV: Tensor) -> dict[int, str]:
    """Zero the slots that hold a NaN or an infinity (their sum does too) and name them."""
    finite_Q = torch.isfinite(logits_QV.sum(dim=-1)).cpu().numpy()
    if finite_Q.all():
        return {}
    bad = np.flatnonzero(~finite_Q).tolist()
    for q in bad:
        logits_QV[q].zero_()
    return dict.fromkeys(bad, NOT_FINITE)
