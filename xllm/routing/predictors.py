"""Predictors of an instance: how long a prompt takes it (`PrefillFit`), and a step of decoding (`DecodeFit`).

The forms are xllm-service's (`time_predictor`): a parabola over a prompt's length, and a plane over the number of
sequences and all their tokens. They are those of the cost model (`cost/cost_model.py`), seen from outside an engine:
`curve_of` and `plane_of` take them from its prices. Unlike there, what is cached counts, and both are learnt all the
time: prompts from when requests begin, steps from what instances report.

Letters: W observations, P terms.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from xllm.cost.cost_model import StepPrices
from xllm.cost.least_squares import MAD_TO_SIGMA, Normal, fit_prices, huber_weights
from xllm.routing.pace import Timing

FEWEST = 4  # observations before they are believed: three prices want more than three
KEPT = 1 - 1 / 256  # of an observation's weight, with each that follows. Chosen: some minutes of traffic decide
# On each term's share of the time: where observations cannot tell them apart, it is tokens that cost. Chosen: noise of
# a tenth does not choose between alike terms, and prices that are known are moved by less than a hundredth.
RIDGE = np.array([1e-3, 1e-4, 1e-3])
RATE_WEIGHT = 0.1  # of the newest error in the running mean; as in `cost/online.py`
START_DEVIATION = 0.3  # relative, of errors before there are any. Chosen: nothing usual is taken for an outlier
# Requests that begin within so many seconds were computed in one step. Chosen: shorter than any step of a prompt.
SAME_STEP_S = 1e-3


class PrefillCurve(NamedTuple):
    """Seconds of a prompt, of each token to compute, and of each square: n n + 2 n c for n tokens behind c cached."""

    start_s: float
    token_s: float
    square_s: float

    def seconds(self, num_new: float, num_cached: float = 0.0) -> float:
        """Of a prompt of which so many tokens are to be computed."""
        return self.start_s + self.token_s * num_new + self.square_s * squares(num_new, num_cached)


class DecodePlane(NamedTuple):
    """Seconds of a step, of each sequence in it, and of each token that these have."""

    step_s: float
    sequence_s: float
    token_s: float

    def seconds(self, num_seqs: float, num_tokens: float) -> float:
        """Of a step of so many sequences, of so many tokens in all."""
        return self.step_s + self.sequence_s * num_seqs + self.token_s * num_tokens


def squares(num_new: float, num_cached: float = 0.0) -> float:
    """What the third price of `PrefillCurve` is for: twice the tokens that attention reads."""
    return num_new * (num_new + 2.0 * num_cached)


def curve_of(prices: StepPrices) -> PrefillCurve:
    """Of an engine whose cost model is known, for prompts that are computed in one step."""
    return PrefillCurve(prices.step, prices.token, prices.read / 2.0)


def plane_of(prices: StepPrices) -> DecodePlane:
    """Of an engine whose cost model is known, without drafts."""
    return DecodePlane(prices.step, prices.token + prices.row, prices.read + prices.decode_read)


class _Fit:
    """Prices of three terms, of which the last observations decide. Not thread-safe."""

    def __init__(self) -> None:
        self._normal, self._num, self._deviation = Normal(3), 0, START_DEVIATION
        self._prices: np.ndarray | None = None
        self.error = 0.0  # running mean of |predicted / measured - 1|, each predicted before it was learnt from

    def _start(self, terms_WP: np.ndarray, seconds_W: np.ndarray) -> None:
        """Begin with a profile: its prices hold at once."""
        self._prices = fit_prices(terms_WP, seconds_W, RIDGE)
        self._normal.add(terms_WP / seconds_W[:, None], np.ones(len(seconds_W)))
        self._num = max(self._num, FEWEST)

    def _note(self, terms_WP: np.ndarray, seconds_W: np.ndarray) -> None:
        """Learn from observations, none of which took no time."""
        shares_WP, weight_W = terms_WP / seconds_W[:, None], np.ones(len(seconds_W))
        if self._prices is not None:
            error_W = shares_WP @ self._prices - 1.0
            size = float(np.median(np.abs(error_W)))
            weight_W = huber_weights(error_W, self._deviation)
            self._deviation += (MAD_TO_SIGMA * size - self._deviation) * RATE_WEIGHT
            self.error += (size - self.error) * RATE_WEIGHT
        self._normal.forget(KEPT ** len(seconds_W))
        self._normal.add(shares_WP, weight_W)
        self._num += len(seconds_W)
        if self._num >= FEWEST:
            self._prices = self._normal.solve(RIDGE)


class PrefillFit(_Fit):
    """Learns a `PrefillCurve`."""

    def start(self, prompts: Iterable[tuple[float, float, float]]) -> None:
        """Take a profile, at least one of each: tokens computed, tokens cached before them, seconds."""
        profile_WK = np.array(list(prompts), dtype=np.float64)
        self._start(_prompt_terms(profile_WK[:, 0], profile_WK[:, 1]), profile_WK[:, 2])

    def note(self, num_prompts: int, num_tokens: float, num_squares: float, seconds: float) -> None:
        """So many prompts, of so many tokens and `squares` in all, were computed one after the other, or together."""
        if seconds > 0.0:
            self._note(np.array([[num_prompts, num_tokens, num_squares]], dtype=np.float64), np.array([seconds]))

    @property
    def curve(self) -> PrefillCurve | None:
        """None before there was enough."""
        return None if self._prices is None else PrefillCurve(*self._prices.tolist())


class DecodeFit(_Fit):
    """Learns a `DecodePlane`."""

    def start(self, steps: Iterable[tuple[float, float, float]]) -> None:
        """Take a profile, at least one of each: sequences, tokens of all, seconds."""
        profile_WK = np.array(list(steps), dtype=np.float64)
        self._start(np.insert(profile_WK[:, :2], 0, 1.0, axis=1), profile_WK[:, 2])

    def note(self, steps: Sequence[Timing], tokens_a_sequence: float) -> None:
        """Take in reported steps; those that computed more than a token for each sequence are passed over: prompts are
        in them, or drafts. tokens_a_sequence: on average, when they were reported."""
        timed = [(1.0, float(num_seqs), num_seqs * tokens_a_sequence, seconds)
                 for _, seconds, num_tokens, num_seqs in steps if seconds > 0.0 and num_tokens == num_seqs]
        if timed:
            steps_WK = np.array(timed, dtype=np.float64)
            self._note(steps_WK[:, :3], steps_WK[:, 3])

    @property
    def plane(self) -> DecodePlane | None:
        """None before there was enough."""
        return None if self._prices is None else DecodePlane(*self._prices.tolist())


def _prompt_terms(new_W: np.ndarray, cached_W: np.ndarray) -> np.ndarray:
    return np.column_stack([np.ones(len(new_W)), new_W, new_W * (new_W + 2.0 * cached_W)])


@dataclass(slots=True)
class _Sent:
    sent_s: float
    num_new: float
    num_squares: float


class PrefillClock:
    """Tells from when requests were sent and begun how long their prompts took to compute.

    An engine computes prompts in the order in which they came. So one has taken it from when the one before it began,
    or from when it was sent, if that was later, until it has begun. Those that begin in the same step are one
    observation. Each event names its request: repeated ones, and those of requests that are not known, change nothing.
    """

    def __init__(self, fit: PrefillFit):
        self._fit = fit
        self._sent: dict[str, _Sent] = {}
        self._last_s = 0.0  # when the last one began before those that begin now
        self._now: list[_Sent] = []  # that have begun in the same step
        self._begun_s = 0.0  # when these did

    def sent(self, request_id: str, num_new: float, num_cached: float, now_s: float) -> None:
        """A request was sent there; so many tokens are to be computed behind those that are cached."""
        self._sent.setdefault(request_id, _Sent(now_s, num_new, squares(num_new, num_cached)))

    def begun(self, request_id: str, now_s: float) -> None:
        """Its first token has come."""
        if (sent := self._sent.pop(request_id, None)) is None:
            return
        if self._now and now_s - self._begun_s > SAME_STEP_S:
            self._settle()
        self._now.append(sent)
        self._begun_s = now_s

    def left(self, request_id: str) -> None:
        """It has ended before it began. Unknown ids are ignored."""
        self._sent.pop(request_id, None)

    def _settle(self) -> None:
        since_s = max(self._last_s, min(sent.sent_s for sent in self._now))
        self._fit.note(len(self._now), sum(sent.num_new for sent in self._now),
                       sum(sent.num_squares for sent in self._now), self._begun_s - since_s)
        self._last_s = self._begun_s
        self._now.clear()
