"""`RepeatProposer`: the last token, again and again."""

from __future__ import annotations

import numpy as np

from xllm.speculative.proposer import TokenHistory


class RepeatProposer:
    """Right where a text repeats one token, and free everywhere else."""

    def propose(self, rows_S: np.ndarray, max_drafts_S: np.ndarray,
                history: TokenHistory) -> tuple[np.ndarray, np.ndarray]:
        """See `Proposer.propose`."""
        last_S = history.token_ids[rows_S, history.num_tokens[rows_S] - 1].astype(np.int32)
        places_R = np.arange(int(max_drafts_S.max(initial=0)))
        drafts_SR = np.where(places_R < max_drafts_S[:, None], last_S[:, None], -1).astype(np.int32)
        return drafts_SR, max_drafts_S.astype(np.int32)
