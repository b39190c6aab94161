"""`LogitEdits`: what one request does to its logits before temperature and truncation.

Order and meaning are vLLM's: allowed_token_ids, bad words, min_tokens, logit_bias, repetition
penalty, frequency penalty, presence penalty. The repetition penalty counts prompt and output, the
other two and bad words the output alone. Rows that need none of this have no `LogitEdits`.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from xllm.request import SamplingParams

_FORBIDDEN = float("-inf")


class LogitEdits:
    """Made when a row enters; holds what can be prepared once."""

    def __init__(self, sampling: SamplingParams, eos_token_ids: tuple[int, ...], vocab_size: int, device: torch.device):
        self._sampling = sampling
        self._device = device
        words = sampling.bad_words_token_ids
        self._bad_tokens = self._ids(word[0] for word in words if len(word) == 1)
        self._bad_words = [word for word in words if len(word) > 1]
        end_ids = {*eos_token_ids, *sampling.stop_token_ids}
        self._end_ids = self._ids(sorted(t for t in end_ids if 0 <= t < vocab_size))
        bias = sampling.logit_bias or {}
        self._bias_ids = self._ids(bias)
        self._bias = torch.tensor(list(bias.values()), dtype=torch.float32, device=device)
        self._not_allowed_V: Tensor | None = None
        if sampling.allowed_token_ids is not None:
            self._not_allowed_V = torch.ones(vocab_size, dtype=torch.bool, device=device)
            self._not_allowed_V[self._ids(sampling.allowed_token_ids)] = False

    @staticmethod
    def needed(sampling: SamplingParams) -> bool:
        """Whether a request ever has its logits edited."""
        return (sampling.needs_history or bool(sampling.logit_bias) or sampling.allowed_token_ids is not None
                or sampling.min_tokens > 0)

    def apply(self, logits_V: Tensor, history: np.ndarray, num_prompt_tokens: int) -> None:
        """Edit fp32 logits in place. history int32: prompt and output that precede the token to draw."""
        output = history[num_prompt_tokens:]
        if self._not_allowed_V is not None:
            logits_V.masked_fill_(self._not_allowed_V, _FORBIDDEN)
        self._forbid_bad_words(logits_V, output)
        if len(output) < self._sampling.min_tokens:
            logits_V[self._end_ids] = _FORBIDDEN
        if len(self._bias_ids):
            logits_V[self._bias_ids] += self._bias
        self._penalise(logits_V, history, output)

    def _forbid_bad_words(self, logits_V: Tensor, output: np.ndarray) -> None:
        """The last token of a bad word is forbidden where the output ends with the others."""
        if len(self._bad_tokens):
            logits_V[self._bad_tokens] = _FORBIDDEN
        if not self._bad_words:
            return
        tail = tuple(output[-max(map(len, self._bad_words)):].tolist())
        last_ids = [word[-1] for word in self._bad_words if tail[len(tail) - len(word) + 1:] == word[:-1]]
        if last_ids:
            logits_V[self._ids(last_ids)] = _FORBIDDEN

    def _penalise(self, logits_V: Tensor, history: np.ndarray, output: np.ndarray) -> None:
        p = self._sampling
        if p.repetition_penalty != 1.0:
            seen = self._ids(np.unique(history))
            values = logits_V[seen]
            logits_V[seen] = torch.where(values > 0, values / p.repetition_penalty, values * p.repetition_penalty)
        if (p.frequency_penalty or p.presence_penalty) and len(output):
            ids, counts = np.unique(output, return_counts=True)
            penalty = (p.frequency_penalty * counts + p.presence_penalty).astype(np.float32)
            logits_V[self._ids(ids)] -= torch.from_numpy(penalty).to(self._device)

    def _ids(self, token_ids: Iterable[int] | np.ndarray) -> Tensor:
        ids = token_ids.astype(np.int64) if isinstance(token_ids, np.ndarray) else np.array(list(token_ids), np.int64)
        return torch.from_numpy(ids).to(self._device)
