"""`StepCost`: how long a step of so many tokens takes, learnt from the steps so far."""

from __future__ import annotations

from dataclasses import dataclass

_DECAY = 0.95  # of what was learnt, a step
_FEWEST = 8.0  # steps, decayed, before anything is said


@dataclass(slots=True)
class StepCost:
    """seconds = base + per_token * tokens: the line of the least squared relative error, old steps fading out.

    Relative, because a long step would outweigh all the short ones, which say more of the base.

    Steps that were all of about one size tell nothing of the base; it is taken for zero then.
    """

    _num: float = 0.0
    _weight: float = 0.0
    _tokens: float = 0.0
    _seconds: float = 0.0
    _tokens_squared: float = 0.0
    _tokens_seconds: float = 0.0

    def note(self, num_tokens: int, seconds: float) -> None:
        """A step computed so many tokens in that time."""
        if seconds <= 0.0:
            return
        weight = 1.0 / (seconds * seconds)
        self._num = self._num * _DECAY + 1.0
        self._weight = self._weight * _DECAY + weight
        self._tokens = self._tokens * _DECAY + weight * num_tokens
        self._seconds = self._seconds * _DECAY + weight * seconds
        self._tokens_squared = self._tokens_squared * _DECAY + weight * num_tokens * num_tokens
        self._tokens_seconds = self._tokens_seconds * _DECAY + weight * num_tokens * seconds

    def line(self) -> tuple[float, float] | None:
        """(base, per token) in seconds, neither negative; None while too few steps are known."""
        if self._num < _FEWEST or self._tokens <= 0.0:
            return None
        mean_tokens, mean_s = self._tokens / self._weight, self._seconds / self._weight
        variance = self._tokens_squared / self._weight - mean_tokens * mean_tokens
        if variance < 0.01 * mean_tokens * mean_tokens:
            return 0.0, mean_s / mean_tokens
        per_token = (self._tokens_seconds / self._weight - mean_tokens * mean_s) / variance
        per_token = min(max(per_token, 0.0), mean_s / mean_tokens)
        return mean_s - per_token * mean_tokens, per_token
