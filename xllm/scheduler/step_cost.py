"""`StepCost`: estimates how long a step takes from what it computes, fitted to the steps so far."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np

# Chosen, not measured, all of them.
_WINDOW = 1024  # steps that are remembered: some seconds of short ones, enough to see steps of several sizes
_FEWEST = 8  # steps before a price is given: three prices want more than three of them
_FRESH = 16  # steps between two fits, and those whose level counts: the machine may have become slower meanwhile
# Penalty on the three prices: where the steps cannot tell them apart, the step itself is taken to cost nothing.
_RIDGE = np.array([1e-2, 1e-3, 1e-3])


class Prices(NamedTuple):
    """Seconds, none negative: of a step, of a token that it computes, and of one before it that it attends to."""

    step: float
    token: float
    read: float


class StepCost:
    """A least-squares fit of the relative error over the last steps: relative, because a long step would outweigh all
    the short ones, which say more of what a step costs by itself.

    Steps of about one size do not show what a step costs by itself; that is then estimated as cheap. A caller that goes
    by it plans smaller steps, which give the fit what it lacks.
    """

    def __init__(self) -> None:
        self._terms_WP = np.zeros((_WINDOW, 3))
        self._seconds_W = np.ones(_WINDOW)
        self._num = self._num_fitted = 0
        self._prices: Prices | None = None

    def note(self, num_tokens: int, num_reads: int, seconds: float) -> None:
        """Take in a step: it computed `num_tokens` tokens, which attended to `num_reads` before them, in `seconds`."""
        if seconds <= 0.0:
            return
        at = self._num % _WINDOW
        self._terms_WP[at] = 1.0, num_tokens, num_reads
        self._seconds_W[at] = seconds
        self._num += 1

    def prices(self) -> Prices | None:
        """The fitted prices, at most `_FRESH` steps old; None before `_FEWEST` steps."""
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
    """The x >= 0 that minimises x' gram x - 2 target' x, by trying every choice of zeros: x is short."""
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
