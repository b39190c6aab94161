"""What a request does to its logits before a token is drawn, for all rows of a step at once and without the host.

Letters: S rows, V vocabulary, X rows that ask for it, W words of a mask, T tokens of all histories.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 32  # tokens of one number of a bitmask


def apply_token_bitmask(logits_SV: Tensor, bitmask_XW: Tensor, rows_X: Tensor) -> None:
    if not len(rows_X):
        return
    vocab_size, device = logits_SV.shape[1], logits_SV.device
    bits = torch.tensor([1 << i if i < WORD - 1 else -(1 << i) for i in range(WORD)], dtype=torch.int32, device=device)
    allowed_XV = ((bitmask_XW[:, :, None] & bits) != 0).flatten(1)[:, :vocab_size]
    width = allowed_XV.shape[1]
    masked_XV = logits_SV.index_select(0, rows_X)
    masked_XV[:, :width].masked_fill_(~allowed_XV, float("-inf"))
    masked_XV[:, width:].fill_(float("-inf"))
    logits_SV.index_copy_(0, rows_X, masked_XV)


def penalise(
    logits_SV: Tensor, rows_X: Tensor, token_ids_T: Tensor, starts_X1: Tensor, output_starts_X: Tensor,
    repetition_X: Tensor, frequency_X: Tensor, presence_X: Tensor,
) -> None:  # fmt: skip
    if not len(rows_X) or not len(token_ids_T):
        return
    num_rows, vocab_size = len(rows_X), logits_SV.shape[1]
    owner_T, place_T, inside_T = _owners(starts_X1, len(token_ids_T))
    belongs_T = (owner_T >= 0) & (owner_T < num_rows)
    owner_T = owner_T.clamp(0, num_rows - 1)
    ids_T = token_ids_T[place_T].long().clamp(0, vocab_size - 1)
    generated_T = inside_T & (place_T >= output_starts_X[owner_T])
    counts_T = _counts(owner_T * vocab_size + ids_T, generated_T, num_rows * vocab_size)
    rows_T = rows_X[owner_T]
    before_T = logits_SV[rows_T, ids_T]
    repetition_T = repetition_X[owner_T]
    value_T = torch.where(before_T > 0, before_T / repetition_T, before_T * repetition_T)
    penalty_T = (frequency_X[owner_T] * counts_T.double() + presence_X[owner_T]).float()
    value_T = torch.where(counts_T > 0, value_T - penalty_T, value_T)
    # Equal tokens of a row write the same number, so that their order does not matter.
    logits_SV.index_put_((rows_T, ids_T), torch.where(belongs_T, value_T, before_T))


def _owners(starts_X1: Tensor, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each token: whose history it is in, its place, and whether it is in any. Those in none take the place of the
    first or last that is; if there is no such, their owner is out of range."""
    starts = starts_X1.long()
    marks = torch.zeros(num_tokens + 1, dtype=torch.int32, device=starts.device)
    marks.index_add_(0, starts, torch.ones_like(starts_X1))
    own_T = torch.arange(num_tokens, device=starts.device)
    place_T = torch.minimum(torch.maximum(own_T, starts[0]), starts[-1] - 1).clamp(0, num_tokens - 1)
    owner_T = marks.cumsum(0)[place_T] - 1
    return owner_T, place_T, (own_T >= starts[0]) & (own_T < starts[-1])


def _counts(keys_T: Tensor, counted_T: Tensor, num_keys: int) -> Tensor:
    """How often each token's key is among the counted ones."""
    counts = torch.zeros(num_keys, dtype=torch.float32, device=keys_T.device)
    return counts.index_add_(0, keys_T, counted_T.float())[keys_T]
