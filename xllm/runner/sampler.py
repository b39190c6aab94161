"""`Sampler`: from logits to tokens, for all slots of a step at once.

Letters: Q slots, X some of them (those of a slice, or with edits or masks), V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from backends.opset import OpSet
from xllm.request import EDITED_AWAY, NO_TOKEN_LEFT, TokenLogprobs
from xllm.runner.columns import sampling_columns
from xllm.runner.logit_edits import LogitEdits, SlotEdits, TableStore, edit_logits
from xllm.runner.logprobs import token_logprobs
from xllm.runner.row_state import NO_LOGPROBS, RowState
from xllm.step import NewRow
from xllm.structured.matchers import RowMatchers, SlotMasks

NOT_FINITE = "the model's logits are not finite"
# Of logits that exist at a time; with more slots they are made in slices. Chosen: 441 slots of a vocabulary of 152,000
# in fp32 are one slice.
SAMPLE_LOGITS_BYTES = 256 * 2**20


class Sampler:
    """Draws tokens from logits. Reads the rows; writes only its own preparations for each row.

    rows_Q, offsets_Q, hidden_Q: of the slots (`HostBatch`).
    """

    def __init__(self, ops: OpSet, rows: RowState, vocab_size: int, device: torch.device):
        self._ops = ops
        self._rows, self._vocab_size = rows, vocab_size
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

    def begin(self, rows_Q: np.ndarray, offsets_Q: np.ndarray) -> None:
        """Start preparing, beside the forward pass, what `draw` needs for these slots. All known tokens must be known
        to the host, with drafts after them."""
        self.matchers.begin(rows_Q, offsets_Q)

    def draw(self, logits_at: Callable[[np.ndarray], Tensor], rows_Q: np.ndarray, offsets_Q: np.ndarray,
             hidden_Q: np.ndarray) -> tuple[np.ndarray, dict[int, str], dict[int, TokenLogprobs]]:
        """Draw one token a slot, in slices of bounded memory: slots are independent of each other. Drafts stand behind
        the known tokens in the row state: those before a slot are its history.

        logits_at: makes the logits of some of hidden_Q, fp32, which are overwritten.

        Returns the token ids (int64 [Q], on the host), and by slot why it failed, whose token is meaningless then, and
        its log-probabilities, if its row asked for them.
        """
        token_ids_Q = np.zeros(len(rows_Q), dtype=np.int64)
        failed, logprobs = dict[int, str](), dict[int, TokenLogprobs]()
        for part in self.slices(len(rows_Q)):
            logits_XV, rows_X, offsets_X = logits_at(hidden_Q[part]), rows_Q[part], offsets_Q[part]
            reasons = _blank_not_finite(logits_XV)
            asked = np.flatnonzero(self._rows.num_logprobs[rows_X] != NO_LOGPROBS)
            raw_AV = logits_XV[torch.from_numpy(asked).to(self._device)] if len(asked) else None
            reasons |= self._edit(logits_XV, rows_X, offsets_X)
            token_ids_Q[part] = token_ids_X = self._choose(logits_XV, rows_X, offsets_X)
            failed |= {part.start + q: reason for q, reason in reasons.items()}
            if raw_AV is not None:
                entries = token_logprobs(raw_AV, token_ids_X[asked], self._rows.num_logprobs[rows_X[asked]])
                logprobs.update(zip((part.start + asked).tolist(), entries, strict=True))
        return token_ids_Q, failed, logprobs

    def slices(self, num_slots: int) -> list[slice]:
        """Parts of the slots whose logits exist at a time."""
        return slices(num_slots, self._vocab_size, SAMPLE_LOGITS_BYTES)

    def _edit(self, logits_QV: Tensor, rows_Q: np.ndarray, offsets_Q: np.ndarray) -> dict[int, str]:
        """Apply each row's `LogitEdits`; slots that end up without any token, or with infinite logits, fail."""
        masks = self.matchers.masks(rows_Q, offsets_Q)
        if masks is not None:
            self._apply_masks(logits_QV, masks)
        if not self._edits and masks is None:
            return {}
        rows, failed = self._rows, {} if masks is None else masks.failed
        num_history_Q = rows.num_tokens[rows_Q] + offsets_Q
        num_output_Q = num_history_Q - rows.num_prompt_tokens[rows_Q]
        edited_Q = rows.edits_logits[rows_Q] | (num_output_Q < rows.min_output_tokens[rows_Q])
        slots_X = np.flatnonzero(edited_Q)
        if not len(slots_X):
            return failed
        places = zip(slots_X.tolist(), rows_Q[slots_X].tolist(), num_history_Q[slots_X].tolist())
        edit_logits(self._ops, logits_QV, [
            SlotEdits(q, self._edits[row], rows.token_ids[row, :num_history], int(rows.num_prompt_tokens[row]))
            for q, row, num_history in places if row in self._edits])
        largest_X = self._largest(logits_QV, slots_X)
        for i in np.flatnonzero(~np.isfinite(largest_X)).tolist():
            q, largest = int(slots_X[i]), float(largest_X[i])
            row = int(rows_Q[q])
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

    def _choose(self, logits_QV: Tensor, rows_Q: np.ndarray, offsets_Q: np.ndarray) -> np.ndarray:
        """Greedy slots by argmax, the others by inverting the CDF at their own uniform number."""
        if not self._rows.columns["temperature"][rows_Q].any():
            return self._ops.argmax(logits_QV).cpu().numpy()
        columns = sampling_columns(self._rows, rows_Q, offsets_Q).values()
        return self._ops.sample(logits_QV, *(torch.from_numpy(c).to(self._device) for c in columns)).cpu().numpy()


def slices(num_slots: int, vocab_size: int, limit_bytes: int) -> list[slice]:
    """Parts of the slots whose logits (fp32) are no larger than that."""
    width = max(1, limit_bytes // (4 * vocab_size))
    return [slice(start, min(start + width, num_slots)) for start in range(0, num_slots, width)]


def _blank_not_finite(logits_QV: Tensor) -> dict[int, str]:
    """Zero the slots that hold a NaN or an infinity (their sum does too) and name them."""
    finite_Q = torch.isfinite(logits_QV.sum(dim=-1)).cpu().numpy()
    if finite_Q.all():
        return {}
    bad = np.flatnonzero(~finite_Q).tolist()
    for q in bad:
        logits_QV[q].zero_()
    return dict.fromkeys(bad, NOT_FINITE)
