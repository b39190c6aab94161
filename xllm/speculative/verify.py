"""Which drafts stand, given what the model itself draws at each of their places.

At every place of a row (after its last known token, and after each draft) the ordinary sampler
draws a token from the model's distribution p there, with the uniform number that belongs to that
position of the sequence. A draft stands if it is the token drawn in its place and all before it
stand; the first draw that differs is the last token of the step.

For a proposer that is certain of its drafts this is the rejection sampling of Leviathan et al. 2023:
with all draft probability on token d, that scheme accepts d with probability min(1, p(d) / 1) = p(d)
and otherwise draws from p restricted to the other tokens. One draw X from p does both: X = d happens
with probability p(d), and given X != d, X follows p restricted to the others. So the output follows
p, and since X depends on seed and position only, it is token for token what a run without
speculation gives.
"""

from __future__ import annotations

import numpy as np


def num_accepted(drawn_SR1: np.ndarray, drafts_SR: np.ndarray) -> np.ndarray:
    """How many leading drafts of each row equal what was drawn in their place: int32 [S].

    Both are padded with -1; a row that drew nothing is all padding.
    """
    if not drafts_SR.shape[1]:
        return np.zeros(len(drafts_SR), dtype=np.int32)
    stands = (drawn_SR1[:, : drafts_SR.shape[1]] == drafts_SR) & (drafts_SR >= 0)
    return np.logical_and.accumulate(stands, axis=1).sum(axis=1, dtype=np.int32)
