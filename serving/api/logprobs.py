"""Log-probabilities in the three shapes that clients know: completions, chat, and vLLM's prompt_logprobs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from xllm.request import TokenLogprobs

if TYPE_CHECKING:
    from xllm.tokenizer import Tokenizer

LOWEST = -9999.0  # JSON has no infinity


class LogprobsWriter:
    """`as_ids`: show tokens as `token_id:N`, which no two tokens share."""

    def __init__(self, tokenizer: Tokenizer | None, *, as_ids: bool):
        self._tokenizer, self._as_ids = tokenizer, as_ids

    def completion(self, token_ids: Sequence[int], entries: Sequence[TokenLogprobs | None],
                   offset: int) -> dict[str, Any]:
        """The legacy completions shape. offset: characters before the first of these tokens.

        A prompt's first token has no log-probability: its entry is None.
        """
        texts = [self.text(token_id) for token_id in token_ids]
        offsets = []
        for text in texts:
            offsets.append(offset)
            offset += len(text)
        return {
            "text_offset": offsets, "tokens": texts,
            "token_logprobs": [None if entry is None else _finite(entry.logprob) for entry in entries],
            "top_logprobs": [None if entry is None else self._by_text(entry) for entry in entries],
        }

    def chat(self, entries: Iterable[TokenLogprobs], num_top: int) -> dict[str, Any]:
        content = []
        for entry in entries:
            top = list(zip(entry.top_ids, entry.top_logprobs))[:num_top]
            content.append({**self._token(entry.token_id, entry.logprob),
                            "top_logprobs": [self._token(token_id, value) for token_id, value in top]})
        return {"content": content, "refusal": None}

    def prompt(self, entries: Iterable[TokenLogprobs | None]) -> list[dict[str, Any] | None]:
        """vLLM's shape: for each prompt token a map from token id to its log-probability, rank and text."""
        return [None if entry is None else self._by_id(entry) for entry in entries]

    def text(self, token_id: int) -> str:
        if self._as_ids or self._tokenizer is None:
            return f"token_id:{token_id}"
        return self._tokenizer.token_text(token_id)

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        raw = None if self._tokenizer is None else list(self._tokenizer.token_bytes(token_id))
        return {"token": self.text(token_id), "logprob": _finite(logprob), "bytes": raw}

    def _by_text(self, entry: TokenLogprobs) -> dict[str, float]:
        found = {self.text(token_id): _finite(value)
                 for token_id, value in zip(reversed(entry.top_ids), reversed(entry.top_logprobs))}
        found[self.text(entry.token_id)] = _finite(entry.logprob)
        return found

    def _by_id(self, entry: TokenLogprobs) -> dict[str, Any]:
        found = {str(entry.token_id): self._ranked(entry.token_id, entry.logprob, entry.rank)}
        for rank, (token_id, value) in enumerate(zip(entry.top_ids, entry.top_logprobs), start=1):
            found.setdefault(str(token_id), self._ranked(token_id, value, rank))
        return found

    def _ranked(self, token_id: int, logprob: float, rank: int) -> dict[str, Any]:
        return {"logprob": _finite(logprob), "rank": rank, "decoded_token": self.text(token_id)}


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)
