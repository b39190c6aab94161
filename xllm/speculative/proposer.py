"""`Proposer`: guesses the next tokens of running rows, so that one step can verify several."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class TokenHistory(Protocol):
    """What a proposer may read of the rows: `token_ids[row, :num_tokens[row]]` are the known tokens."""

    token_ids: np.ndarray
    num_tokens: np.ndarray


class Proposer(Protocol):
    """A source of draft tokens. It may keep state of its own, but never writes the rows.

    A draft is taken to be certain (all probability on the drafted token), which is what
    `verify.num_accepted` is exact for. A proposer that draws its drafts from a distribution of its own
    needs rejection sampling against that distribution instead (Leviathan et al. 2023).
    """

    def propose(self, rows_S: np.ndarray, max_drafts_S: np.ndarray,
                history: TokenHistory) -> tuple[np.ndarray, np.ndarray]:
        """Drafts int32 [S, R], padded with -1, and how many each row has, int32 [S].

        R is the largest of max_drafts_S; a row never gets more than its own maximum.
        """
        ...
