"""What a request does to its logits before a token is drawn, one row at a time."""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 32  # tokens of one number of a bitmask


def apply_token_bitmask(logits_SV: Tensor, bitmask_XW: Tensor, rows_X: Tensor) -> None:
    bits = torch.arange(WORD, dtype=torch.int32, device=bitmask_XW.device)
    vocab_size = logits_SV.shape[1]
    for mask_W, row in zip(bitmask_XW, rows_X.tolist(), strict=True):
        allowed_V = torch.zeros(max(vocab_size, len(mask_W) * WORD), dtype=torch.bool, device=logits_SV.device)
        allowed_V[: len(mask_W) * WORD] = ((mask_W[:, None] >> bits) & 1).bool().flatten()
        logits_SV[row].masked_fill_(~allowed_V[:vocab_size], float("-inf"))


def penalise(
    logits_SV: Tensor, rows_X: Tensor, token_ids_T: Tensor, starts_X1: Tensor, output_starts_X: Tensor,
    repetition_X: Tensor, frequency_X: Tensor, presence_X: Tensor,
) -> None:  # fmt: skip
    starts = starts_X1.tolist()
    for x, (row, middle) in enumerate(zip(rows_X.tolist(), output_starts_X.tolist(), strict=True)):
        logits_V = logits_SV[row]
        if repetition_X[x] != 1.0:
            seen = token_ids_T[starts[x] : starts[x + 1]].unique().long()
            values = logits_V[seen]
            logits_V[seen] = torch.where(values > 0, values / repetition_X[x], values * repetition_X[x])
        ids, counts = token_ids_T[middle : starts[x + 1]].unique(return_counts=True)
        penalty = frequency_X[x] * counts + presence_X[x]
        logits_V[ids.long()] -= penalty.float()
