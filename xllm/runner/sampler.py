"""`Sampler`: from logits to tokens, for all slots of a step at once.

Letters: Q slots, X those with edits or masks, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from backends.opset import OpSet
from xllm.request import EDITED_AWAY, NO_TOKEN_LEFT, TokenLogprobs
from xllm.runner.batch import SampleSlots
from xllm.runner.columns import sampling_columns
from xllm.runner.logit_edits import LogitEdits, SlotEdits, TableStore, edit_logits
from xllm.runner.logprobs import token_logprobs
from xllm.runner.row_state import NO_LOGPROBS, RowState
from xllm.step import NewRow
from xllm.structured.matchers import RowMatchers, SlotMasks

NOT_FINITE = "the model's logits are not finite"


@dataclass(frozen=True, slots=True, kw_only=True)
class Draws:
    """token_ids_Q int64, on the host. logprobs and failed: by slot. A failed slot's token is meaningless."""

    token_ids_Q: np.ndarray
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)


class Sampler:
    """Draws tokens from logits. Reads the rows; writes only its own preparations for each row."""

    def __init__(self, ops: OpSet, rows: RowState, vocab_size: int, device: torch.device):
        self._ops = ops
        self._rows = rows
        self._device = device
        self._tables = TableStore(vocab_size, device)
        self._edits: dict[int, LogitEdits] = {}
        self._eos_ids: dict[int, tuple[int, ...]] = {}  # of the rows with a grammar
        self.matchers = RowMatchers(rows, vocab_size)

    def enter(self, new: NewRow) -> None:
        """Prepare for a row; goes with `RowState.enter`."""
        if LogitEdits.needed(new.sampling):
            self._edits[new.row] = LogitEdits(new.sampling, self._tables.of(new.sampling, new.eos_token_ids))
        if new.sampling.structured is not None:
            self.matchers.enter(new)
            self._eos_ids[new.row] = new.eos_token_ids

    def release(self, row: int) -> None:
        """Goes with `RowState.release`."""
        self._edits.pop(row, None)
        self._eos_ids.pop(row, None)
        self.matchers.release(row)

    def begin(self, slots: SampleSlots) -> None:
        """Start preparing, beside the forward pass, what `draw` needs for these slots. All known tokens must be known
        to the host, with drafts after them."""
        self.matchers.begin(slots)

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
        masks = self.matchers.masks(slots)
        if masks is not None:
            self._apply_masks(logits_QV, masks)
        if not self._edits and masks is None:
            return {}
        rows, failed = self._rows, {} if masks is None else masks.failed
        num_history_Q = rows.num_tokens[slots.rows] + slots.offsets
        num_output_Q = num_history_Q - rows.num_prompt_tokens[slots.rows]
        edited_Q = rows.edits_logits[slots.rows] | (num_output_Q < rows.min_output_tokens[slots.rows])
        slots_X = np.flatnonzero(edited_Q)
        if not len(slots_X):
            return failed
        places = zip(slots_X.tolist(), slots.rows[slots_X].tolist(), num_history_Q[slots_X].tolist())
        edit_logits(self._ops, logits_QV, [
            SlotEdits(q, self._edits[row], rows.token_ids[row, :num_history], int(rows.num_prompt_tokens[row]))
            for q, row, num_history in places if row in self._edits])
        largest_X = self._largest(logits_QV, slots_X)
        for i in np.flatnonzero(~np.isfinite(largest_X)).tolist():
            q, largest = int(slots_X[i]), float(largest_X[i])
            row = int(slots.rows[q])
            if largest == -math.inf and self._may_end(row, q, masks):
                logits_QV[q, self._eos_ids[row][0]] = 0.0
            else:
                failed[q] = NO_TOKEN_LEFT if largest == -math.inf else EDITED_AWAY
                logits_QV[q].zero_()
        return failed

    def _largest(self, logits_QV: Tensor, slots_X: np.ndarray) -> np.ndarray:
        """The largest logit of each of some slots, NaN if any of a slot's logits is."""
        if len(slots_X) < len(logits_QV):
            logits_QV = logits_QV[torch.from_numpy(slots_X).to(self._device)]
        return logits_QV.amax(dim=1).cpu().numpy()

    def _apply_masks(self, logits_QV: Tensor, masks: SlotMasks) -> None:
        mask_XW, slots_X = (torch.from_numpy(array).to(self._device) for array in (masks.mask_XW, masks.slots_X))
        self._ops.apply_token_bitmask(logits_QV, mask_XW, slots_X)

    def _may_end(self, row: int, slot: int, masks: SlotMasks | None) -> bool:
        """Whether the row's grammar is complete at this slot: the row then ends, whatever else edited its logits."""
        eos_ids = self._eos_ids.get(row)
        return bool(masks is not None and eos_ids and slot not in masks.failed and masks.allows(slot, eos_ids[0]))

    def _choose(self, logits_QV: Tensor, slots: SampleSlots) -> np.ndarray:
        """Greedy slots by argmax, the others by inverting the CDF at their own uniform number."""
        if not self._rows.columns["temperature"][slots.rows].any():
            return self._ops.argmax(logits_QV).cpu().numpy()
        columns = sampling_columns(self._rows, slots).values()
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
