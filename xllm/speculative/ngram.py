"""N-gram prompt lookup: drafts the tokens that followed the last occurrence of the same tokens."""

from __future__ import annotations

import numpy as np

from xllm.speculative.proposer import TokenHistory

PADDING = -1  # no token has that id


class NgramProposer:
    """Copies the tokens that followed an earlier occurrence of the longest matching suffix.

    Suffixes of `max_length` down to `min_length` tokens are looked up in prompt and output; among
    occurrences of the longest one found, the most recent counts.
    """

    def __init__(self, *, min_length: int, max_length: int):
        assert 1 <= min_length <= max_length
        self._min_length = min_length
        self._max_length = max_length

    def propose(self, rows_S: np.ndarray, max_drafts_S: np.ndarray,
                history: TokenHistory) -> tuple[np.ndarray, np.ndarray]:
        """See `Proposer.propose`."""
        drafts_SR = np.full((len(rows_S), int(max_drafts_S.max(initial=0))), PADDING, dtype=np.int32)
        num_drafts_S = np.zeros(len(rows_S), dtype=np.int32)
        for i in np.flatnonzero(max_drafts_S > 0).tolist():
            row = rows_S[i]
            tokens = history.token_ids[row, : history.num_tokens[row]]
            end = find_match(tokens, self._min_length, self._max_length)
            if end is not None:
                num_drafts_S[i] = num = max_drafts_S[i]
                drafts_SR[i, :num] = copy_forward(tokens, end, num)
        return drafts_SR, num_drafts_S


def find_match(tokens: np.ndarray, min_length: int, max_length: int) -> int | None:
    """Index just behind the most recent earlier occurrence of the longest suffix; None without one.

    The earlier occurrence may overlap the suffix itself.
    """
    last = len(tokens) - 1
    ends = np.flatnonzero(tokens[:last] == tokens[last])  # where occurrences of the suffix so far end, in order
    best = None
    for length in range(1, max_length + 1):
        if length > 1:
            ends = ends[np.searchsorted(ends, length - 1) :]
            if len(ends):
                ends = ends[tokens[ends - (length - 1)] == tokens[last - (length - 1)]]
        if not len(ends):
            break
        if length >= min_length:
            best = int(ends[-1]) + 1
    return best


def copy_forward(tokens: np.ndarray, start: int, num: int) -> np.ndarray:
    """`num` tokens from `start` on; where they run out, the copy goes on from its own beginning.

    This is the overlapping copy of LZ77 (Ziv and Lempel 1977): a sequence that repeats itself with
    period len(tokens) - start is drafted to go on repeating.
    """
    return tokens[start + np.arange(num) % (len(tokens) - start)]
