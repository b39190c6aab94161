"""`PaceFit`: how fast an instance computes, learnt from the steps that it reports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from xllm.cost.least_squares import Normal

Timing = tuple[float, float, int, int]  # end on a clock, seconds, tokens computed, sequences: `step_log.StepTiming`
# What is assumed of one that nothing is known of, where nothing is known of the others either. Chosen: a small model on
# a CPU; they decide nothing where all are alike, but whether targets seem to be kept.
PREFILL_TOKENS_PER_S, STEP_S = 2000.0, 0.02
FEWEST_STEPS = 8  # before they are believed: as in `cost/fit.py`
KEPT = 1 - 1 / 512  # of a step's weight, with each that follows. Chosen: the last minute or so decides
# On each term's share of a step's time, as in `cost/online.py`: where steps cannot tell them apart, it is the tokens.
_RIDGE = np.array([1e-2, 1e-3, 1e-2])


class StepPace(NamedTuple):
    """Seconds of a step, and what a prompt's token and a sequence add. 0 for what never occurred."""

    step_s: float
    token_s: float
    sequence_s: float


class PaceFit:
    """Fitted to the steps of late: seconds = a + b x prompt tokens + c x sequences. A draft's tokens count as
    prompt tokens: reports do not tell them apart. Not thread-safe."""

    def __init__(self) -> None:
        self._normal = Normal(3)
        self._num_steps = 0
        self.prices: StepPace | None = None  # of late; None before there were `FEWEST_STEPS`

    def note(self, steps: Sequence[Timing]) -> None:
        """Take in steps, in the order in which they ended."""
        timed = np.array([(seconds, num_tokens - num_seqs, num_seqs) for _, seconds, num_tokens, num_seqs in steps
                          if seconds > 0.0], dtype=np.float64).reshape(-1, 3)
        if not len(timed):
            return
        terms = np.column_stack((np.ones(len(timed)), np.maximum(0.0, timed[:, 1]), timed[:, 2]))
        self._normal.forget(KEPT ** len(timed))
        self._normal.add(terms / timed[:, :1], np.ones(len(timed)))
        self._num_steps += len(timed)
        if self._num_steps >= FEWEST_STEPS:  # now, and not when a call waits for a decision
            self.prices = StepPace(*self._normal.solve(_RIDGE).tolist())
