"""Non-negative least squares of the relative error, of few terms, robust against outliers. numpy only.

seconds = sum of price x term, every price >= 0. The relative error is minimised, not the absolute one: a long step
would outweigh all short ones, which say more of what a step costs by itself.

Letters: W observations, P terms.
"""

from __future__ import annotations

import numpy as np

# Huber's 1.345: 95 % as good as least squares where errors are normal (Huber, "Robust Statistics", 1981).
HUBER = 1.345
MAD_TO_SIGMA = 1.4826  # of a normal distribution: its deviation over its median absolute deviation
TINY = 1e-300  # under what is divided by
LEAST_DEVIATION = 1e-6  # relative: observations that agree better are all believed
ROUNDS = 12  # of reweighting; chosen: weights stand still after fewer


class Normal:
    """The normal equations of weighted observations: what a fit needs, in P x P numbers, whatever their count."""

    __slots__ = ("count", "gram_PP", "sum_P")

    def __init__(self, num_terms: int):
        self.gram_PP, self.sum_P, self.count = np.zeros((num_terms, num_terms)), np.zeros(num_terms), 0.0

    def add(self, shares_WP: np.ndarray, weight_W: np.ndarray) -> None:
        """Add observations. shares_WP: terms over seconds; their sum, weighted by prices, should be 1."""
        weighted_WP = shares_WP * weight_W[:, None]
        self.gram_PP += shares_WP.T @ weighted_WP
        self.sum_P += weighted_WP.sum(0)
        self.count += float(weight_W.sum())

    def forget(self, kept: float) -> None:
        """Make all observations so far count `kept` times as much."""
        self.gram_PP *= kept
        self.sum_P *= kept
        self.count *= kept

    def solve(self, ridge_P: np.ndarray) -> np.ndarray:
        """The prices. ridge_P: penalty on each term's mean share of the time; of terms that the observations cannot
        tell apart, the one with the smaller penalty gets the time. A term that never occurred is priced 0. There must
        be an observation."""
        seen, prices_P = np.flatnonzero(self.sum_P), np.zeros(len(self.sum_P))
        mean = self.sum_P[seen] / self.count
        gram = self.gram_PP[seen[:, None], seen] / self.count / (mean[:, None] * mean)
        gram.flat[:: len(seen) + 1] += ridge_P[seen]
        prices_P[seen] = _positive(gram, np.ones(len(seen))) / mean
        return prices_P


def _positive(gram: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The x >= 0 that minimises x' gram x - 2 target' x: Lawson and Hanson, "Solving Least Squares Problems" (1974),
    chapter 23, on the normal equations. gram: positive definite, else LinAlgError."""
    x = np.linalg.solve(gram, target)
    if (x >= 0.0).all():  # the usual case
        return x
    x, active = np.zeros(len(target)), np.zeros(len(target), dtype=bool)
    for _ in range(3 * len(target)):  # as they do; two or three times as many as ever needed
        slope = np.where(active, -np.inf, target - gram @ x)
        if slope.max() <= 1e-10:
            break
        active[int(slope.argmax())] = True
        while active.any():
            at = np.flatnonzero(active)
            best = np.linalg.solve(gram[np.ix_(at, at)], target[at])
            if (best > 0.0).all():
                x[:] = 0.0
                x[at] = best
                break
            falling = at[best <= 0.0]
            step = (x[falling] / np.maximum(x[falling] - best[best <= 0.0], TINY)).min()
            x[at] += step * (best - x[at])
            active &= x > 1e-15
            x[~active] = 0.0
    return x


def huber_weights(error_W: np.ndarray, deviation: float) -> np.ndarray:
    """1 for usual errors, less the farther beyond them: an outlier pulls no harder than the last usual error."""
    return np.minimum(1.0, HUBER * max(deviation, LEAST_DEVIATION) / np.maximum(np.abs(error_W), TINY))


def fit_prices(terms_WP: np.ndarray, seconds_W: np.ndarray, ridge_P: np.ndarray) -> np.ndarray:
    """The prices of all observations at once: least squares, reweighted until outliers count for little, and scaled so
    that the median error is 0."""
    shares_WP, weight_W = terms_WP / seconds_W[:, None], np.ones(len(seconds_W))
    prices_P = np.zeros(terms_WP.shape[1])
    for _ in range(ROUNDS):
        normal = Normal(terms_WP.shape[1])
        normal.add(shares_WP, weight_W)
        prices_P = normal.solve(ridge_P)
        # As a factor, either way: a step that took ten times as long is as wrong as one that took a tenth.
        error_W = np.log(np.maximum(shares_WP @ prices_P, TINY))
        error_W -= np.median(error_W)
        deviation = MAD_TO_SIGMA * float(np.median(np.abs(error_W)))
        weight_W = huber_weights(error_W, deviation) ** 2  # squared: it falls off to nothing far out
    return prices_P * float(np.median(1.0 / np.maximum(shares_WP @ prices_P, TINY)))
