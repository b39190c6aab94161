"""`StepCost`: how long a step takes by what it computes, learnt from the steps so far."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np

_WINDOW = 1024  # steps that are remembered: some seconds of short ones
_FEWEST = 8  # before anything is said
_FRESH = 16  # steps between two fits, and those whose level counts: the machine may have become slower meanwhile
_RIDGE = np.array([1e-2, 1e-3, 1e-3])  # where steps cannot tell them apart, the step itself is what costs nothing


class Prices(NamedTuple):
    """Seconds, none negative: of a step, of a token that it computes, and of one before it that it attends to."""

    step: float
    token: float
    read: float


class StepCost:
    """The least squares of the relative error over the last steps: relative, because a long step would outweigh all the
    short ones, which say more of what a step costs by itself.

    Steps that were all of about one size tell nothing of that; it is then taken for cheap. A caller that believes it
    plans smaller steps, and so finds out.
    """

    def __init__(self) -> None:
        self._terms_WP = np.zeros((_WINDOW, 3))
        self._seconds_W = np.ones(_WINDOW)
        self._num = self._num_fitted = 0
        self._prices: Prices | None = None

    def note(self, num_tokens: int, num_reads: int, seconds: float) -> None:
        """A step computed so many tokens, which attended to so many before them, in that time."""
        if seconds <= 0.0:
            return
        at = self._num % _WINDOW
        self._terms_WP[at] = 1.0, num_tokens, num_reads
        self._seconds_W[at] = seconds
        self._num += 1

    def prices(self) -> Prices | None:
        """None while too few steps are known."""
        if self._num >= _FEWEST and (self._prices is None or self._num - self._num_fitted >= _FRESH):
            self._prices, self._num_fitted = self._fit(), self._num
        return self._prices

    def _fit(self) -> Prices:
        num = min(self._num, _WINDOW)
        terms_WP, seconds_W = self._terms_WP[:num], self._seconds_W[:num]
        scale_P = np.maximum(np.abs(terms_WP / seconds_W[:, None]).mean(0), 1e-300)
        shares_WP = terms_WP / seconds_W[:, None] / scale_P  # whose weighted sum should be 1
        found = _positive_least_squares(shares_WP.T @ shares_WP / num + np.diag(_RIDGE), shares_WP.mean(0)) / scale_P
        last = np.arange(self._num - min(num, _FRESH), self._num) % _WINDOW
        level = float(np.median(self._seconds_W[last] / np.maximum(self._terms_WP[last] @ found, 1e-12)))
        return Prices(*(found * level).tolist())


def _positive_least_squares(gram_PP: np.ndarray, target_P: np.ndarray) -> np.ndarray:
    """The x >= 0 of the least x' gram x - 2 target' x, by trying which of them are zero: there are few."""
    best, best_loss = np.zeros(len(target_P)), 0.0
    for kept in itertools.product((False, True), repeat=len(target_P)):
        at = np.flatnonzero(kept)
        if not len(at):
            continue
        x = np.linalg.solve(gram_PP[np.ix_(at, at)], target_P[at])
        loss = -float(target_P[at] @ x)
        if (x >= 0.0).all() and loss < best_loss:
            best, best_loss = np.zeros(len(target_P)), loss
            best[at] = x
    return best
