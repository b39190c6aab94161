"""`OnlineCost`: the cost model of a running engine, learnt from each of its steps and moves."""

from __future__ import annotations

import math
from collections import deque

import numpy as np

from xllm.cost.cost_model import NO_ERROR, CostModel, FitError, MovePrices, StepPrices, terms_of
from xllm.cost.fit import FEWEST_STEPS, error_of, fit
from xllm.cost.least_squares import MAD_TO_SIGMA, TINY, Normal, huber_weights
from xllm.cost.observations import MeasuredStep, Profile, StepWork

# Chosen, not measured, all of them.
BLOCK = 16  # steps that are taken in at once: numpy's price for a call is shared by so many
KEPT = 1 - BLOCK / 1024  # of the weight of older steps, when a block is added: the last thousand steps or so decide
START_WEIGHT = 256  # of a profile at the start, in steps: a quarter of those that decide later
REFIT_BLOCKS = 4  # between two fits while the machine stays as it is
SURPRISE = 0.1  # the median relative error of a block that asks for a fit at once
RATE_WEIGHT = 0.1  # of the newest step in running means
ERRORS = 256  # of the last predictions that are remembered: the error is that of late
MIN_PREFILL_TOKENS = 64  # a step with fewer says little of how fast prompts are computed
# On each term's share of a step's time: where steps cannot tell them apart, the step itself is taken to cost little,
# and a row of decode no more than its token. Larger than in `fit.py`: noise must not choose between alike terms.
RIDGE = np.array([1e-2, 1e-3, 1e-2, 1e-3, 1e-2])
MOVE_WINDOW = 64  # moves of a kind that decide
MOVE_RIDGE = np.array([1e-3, 1e-4])


class OnlineCost:
    """Learns step by step; a step costs it O(1).

    Steps are collected and taken in a block at a time: the block is predicted first (which gives the error: every step
    is held out once), then added to the normal equations, of which older steps fade exponentially, then the prices are
    scaled so that the block's median error is 0, because a machine becomes faster or slower as a whole sooner than in
    parts. A step far off the others of its block counts for less (Huber). Belongs to the scheduler's thread; `last`,
    `error` and `model` may be read by others.
    """

    def __init__(self) -> None:
        self.step_s = 0.0  # a running mean; 0 before the first step
        self.drafts_per_row = 0.0  # a running mean: draft tokens behind the token of a decode row
        self.knows_prefill = False  # whether a step was seen that computed a prompt of some length
        self._moves: dict[str, OnlineMoves] = {}
        self._last: tuple[StepWork, float] | None = None
        self._new: list[tuple[float, ...]] = []  # steps that are not taken in: terms and seconds
        self._normal = Normal(len(StepPrices._fields))
        self._found_P: np.ndarray | None = None  # the fitted prices, before they are scaled
        self._prices: StepPrices | None = None
        self._deviation = 0.0  # of usual steps from their predictions, relative
        self._blocks_left = 0  # before the next fit
        self._errors: deque[float] = deque(maxlen=ERRORS)

    # --- taking in

    def start(self, profile: Profile) -> None:
        """Begin with what an earlier engine measured, as if it had been measured here a while ago: its prices hold at
        once, and the steps of this engine outweigh it soon. Called before the first step."""
        steps = [step for step in profile.steps if step.seconds > 0.0]
        self._prices = fit(Profile(steps=steps)).steps
        if self._prices is not None:
            self._found_P, self._blocks_left = np.array(self._prices), REFIT_BLOCKS
            shares_WP = np.array([terms_of(step.work) for step in steps]) / np.array([[s.seconds] for s in steps])
            off_W = shares_WP @ self._found_P - 1.0
            self._deviation = MAD_TO_SIGMA * _median(np.abs(off_W))
            self._normal.add(shares_WP, huber_weights(off_W, self._deviation))
            self._normal.forget(min(1.0, START_WEIGHT / self._normal.count))
            self.knows_prefill = any(step.work.num_prefill_tokens >= MIN_PREFILL_TOKENS for step in steps)
        for move in profile.moves:
            self.note_move(*move)

    def note_step(self, work: StepWork, seconds: float) -> None:
        """A step has ended."""
        if seconds <= 0.0:
            return
        self.step_s += (seconds - self.step_s) * (RATE_WEIGHT if self.step_s else 1.0)
        if rows := work.num_decode_rows:
            self.drafts_per_row += (work.num_decode_tokens / rows - 1 - self.drafts_per_row) * RATE_WEIGHT
        self.knows_prefill |= work.num_prefill_tokens >= MIN_PREFILL_TOKENS
        self._last = work, seconds
        self._new.append((*terms_of(work), seconds))
        if len(self._new) == BLOCK or (self._prices is None and len(self._new) == FEWEST_STEPS):
            self._take_in()

    def note_move(self, kind: str, num_bytes: float, seconds: float) -> None:
        """A move of bytes has ended. seconds: while they moved."""
        if seconds > 0.0:
            if kind not in self._moves:
                self._moves[kind] = OnlineMoves()
            self._moves[kind].note(num_bytes, seconds)

    def _take_in(self) -> None:
        steps_BK = np.array(self._new)
        self._new.clear()
        shares_BP = steps_BK[:, :-1] / steps_BK[:, -1:]
        weight_B, surprise = np.ones(len(steps_BK)), math.inf
        if self._prices is not None:
            predicted_B = shares_BP @ np.array(self._prices)
            errors_B = np.abs(predicted_B - 1.0)
            self._errors.extend(errors_B.tolist())
            level, surprise = _median(predicted_B), _median(errors_B)
            off_B = predicted_B / max(level, TINY) - 1.0
            weight_B = huber_weights(off_B, self._deviation)
            self._deviation += (MAD_TO_SIGMA * _median(np.abs(off_B)) - self._deviation) * RATE_WEIGHT
        self._normal.forget(KEPT)
        self._normal.add(shares_BP, weight_B)
        self._blocks_left -= 1
        if self._blocks_left <= 0 or surprise > SURPRISE:
            self._found_P, self._blocks_left = self._normal.solve(RIDGE), REFIT_BLOCKS
        assert self._found_P is not None, "fitted at the first block"
        scale = 1.0 / max(_median(shares_BP @ self._found_P), TINY)
        self._prices = StepPrices(*(self._found_P * scale).tolist())

    # --- what it says

    def prices(self) -> StepPrices | None:
        """Of the steps so far, but for the newest few; None before there were `FEWEST_STEPS`."""
        return self._prices

    def prefill_s(self, num_tokens: int, num_cached: int = 0) -> float | None:
        """The time that computing a prompt adds to steps that run anyway; None before a prompt of some length was
        computed."""
        if self._prices is None or not self.knows_prefill:
            return None
        return CostModel(steps=self._prices).prefill_s(num_tokens, num_cached) - self._prices.step

    def move_s(self, kind: str, num_bytes: float) -> float | None:
        """The time of moving so many bytes, in several moves if they are more than what is usual; None before the first
        move of its kind."""
        moves = self._moves.get(kind)
        return None if moves is None else moves.seconds(num_bytes)

    @property
    def last(self) -> MeasuredStep | None:
        """The step that ended last."""
        return None if self._last is None else MeasuredStep(*self._last)

    @property
    def last_predicted_s(self) -> float | None:
        """What the prices of now say of the step that ended last; None before there are any."""
        last, prices = self._last, self._prices
        return None if last is None or prices is None else prices.predict(last[0])

    @property
    def error(self) -> FitError:
        """Of the last `ERRORS` steps, each predicted before it was learnt from."""
        errors = list(self._errors)
        return error_of(1.0 + np.array(errors), np.ones(len(errors)))

    @property
    def model(self) -> CostModel:
        """What is known now."""
        moves = dict(self._moves)
        return CostModel(steps=self._prices, steps_error=self.error,
                         moves={kind: move.prices() for kind, move in moves.items()},
                         moves_error={kind: move.error for kind, move in moves.items()})


class OnlineMoves:
    """The prices of one kind of move, of which the last `MOVE_WINDOW` or so decide."""

    def __init__(self) -> None:
        self._normal = Normal(len(MovePrices._fields))
        self._usual_bytes = 0.0  # a running mean
        self._prices: MovePrices | None = None
        self._errors: deque[float] = deque(maxlen=MOVE_WINDOW)

    def note(self, num_bytes: float, seconds: float) -> None:
        """A move has ended."""
        share_P = np.array([[1.0, num_bytes]]) / seconds
        if self._normal.count:
            self._errors.append(abs(self.prices().predict(num_bytes) / seconds - 1.0))
        self._usual_bytes += (num_bytes - self._usual_bytes) * (RATE_WEIGHT if self._usual_bytes else 1.0)
        self._normal.forget(1 - 1 / MOVE_WINDOW)
        self._normal.add(share_P, np.ones(1))
        self._prices = None

    def prices(self) -> MovePrices:
        """After the first move."""
        if self._prices is None:
            self._prices = MovePrices(*self._normal.solve(MOVE_RIDGE).tolist())
        return self._prices

    def seconds(self, num_bytes: float) -> float:
        """Of as many moves of the usual size as that takes, one after the other."""
        prices = self.prices()
        return prices.start * max(1.0, num_bytes / max(self._usual_bytes, 1.0)) + prices.byte * num_bytes

    @property
    def error(self) -> FitError:
        """Of the last moves, each predicted before it was learnt from."""
        errors = list(self._errors)
        return error_of(1.0 + np.array(errors), np.ones(len(errors))) if errors else NO_ERROR


def _median(values: np.ndarray) -> float:
    """Of few values; a quarter of what `np.median` takes."""
    ordered = sorted(values.tolist())
    return float(ordered[len(ordered) // 2])
