"""`fit`: makes a `CostModel` of a `Profile`, with the error of each part on observations that it was not fitted to."""

from __future__ import annotations

import numpy as np

from xllm.cost.cost_model import NO_ERROR, CostModel, FitError, MovePrices, StepPrices, terms_of
from xllm.cost.least_squares import TINY, fit_prices
from xllm.cost.observations import Profile

FEWEST_STEPS = 8  # before they are priced: five prices want more than five observations
FEWEST_MOVES = 2  # of one kind: two prices
FOLDS = 5  # of the observations, each predicted from the other four; the usual number
# Only what observations cannot tell apart is decided by it: then a step itself is cheap, and a row of decode has no
# price beside its token's. Chosen: small enough to change no price that is known.
RIDGE = np.array([1e-7, 1e-8, 1e-7, 1e-8, 1e-7])
MOVE_RIDGE = np.array([1e-7, 1e-8])  # the same: by its bytes rather than by itself


def fit(profile: Profile) -> CostModel:
    """Fit all that the profile says something of: steps if there are `FEWEST_STEPS`, and each kind of move of which
    there are `FEWEST_MOVES`. Observations without a duration are passed over."""
    steps = [step for step in profile.steps if step.seconds > 0.0]
    prices, error = None, NO_ERROR
    if len(steps) >= FEWEST_STEPS:
        terms_WP = np.array([terms_of(step.work) for step in steps])
        seconds_W = np.array([step.seconds for step in steps])
        prices = StepPrices(*fit_prices(terms_WP, seconds_W, RIDGE).tolist())
        error = cross_validate(terms_WP, seconds_W, RIDGE)
    moves, moves_error = {}, {}
    for kind in sorted({move.kind for move in profile.moves}):
        measured = [(move.num_bytes, move.seconds) for move in profile.moves
                    if move.kind == kind and move.seconds > 0.0]
        if len(measured) >= FEWEST_MOVES:
            bytes_W, seconds_W = np.array(measured, dtype=np.float64).T
            terms_WP = np.column_stack([np.ones(len(bytes_W)), bytes_W])
            moves[kind] = MovePrices(*fit_prices(terms_WP, seconds_W, MOVE_RIDGE).tolist())
            moves_error[kind] = cross_validate(terms_WP, seconds_W, MOVE_RIDGE)
    return CostModel(steps=prices, steps_error=error, moves=moves, moves_error=moves_error)


def cross_validate(terms_WP: np.ndarray, seconds_W: np.ndarray, ridge_P: np.ndarray) -> FitError:
    """The error of each observation's prediction from those of the other folds."""
    predicted_W, fold_W = np.zeros(len(seconds_W)), np.arange(len(seconds_W)) % FOLDS
    for fold in range(min(FOLDS, len(seconds_W))):
        held, used = fold_W == fold, fold_W != fold
        predicted_W[held] = terms_WP[held] @ fit_prices(terms_WP[used], seconds_W[used], ridge_P)
    return error_of(predicted_W, seconds_W)


def error_of(predicted_W: np.ndarray, measured_W: np.ndarray) -> FitError:
    """Of predictions that were made without these measurements."""
    if not len(measured_W):
        return NO_ERROR
    median, p90 = np.quantile(np.abs(predicted_W / np.maximum(measured_W, TINY) - 1.0), [0.5, 0.9]).tolist()
    return FitError(median, p90, len(measured_W))
