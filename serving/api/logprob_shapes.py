"""Log-probabilities in the three shapes that clients know: completions, chat, and vLLM's prompt_logprobs."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from serving.api.json_slices import sliced
from xllm.client.assemble import Completion, Piece
from xllm.request import SamplingParams, TokenLogprobs
from xllm.text.token_text import TextContext
from xllm.text.tokenizer import Tokenizer

LOWEST = -9999.0  # stands for minus infinity, which JSON lacks; vLLM's number


class LogprobsWriter:
    """Writes the log-probabilities of one sequence, piece after piece.

    context: the place of the first token; moves on with what is written. None: tokens have no texts. `as_ids`: show
    tokens as `token_id:N`, which no two tokens share.
    """

    def __init__(self, context: TextContext | None, *, as_ids: bool):
        self._context, self._as_ids = context, as_ids

    def completion(self, token_ids: Sequence[int], entries: Sequence[TokenLogprobs | None],
                   offsets: Sequence[int]) -> dict[str, list[Any]]:
        """The legacy completions shape. offsets: of each token in the text that is returned; none: there is no text.

        A prompt's first token has no log-probability: its entry is None.
        """
        names, tops = [], []
        for index, token_id in enumerate(token_ids):
            names.append(self._name(token_id))
            entry = entries[index] if index < len(entries) else None
            tops.append(None if entry is None else self._by_name(entry))
            self._move_past(token_id)
        return {"text_offset": list(offsets) or [0] * len(names), "tokens": names,
                "token_logprobs": [None if entry is None else _finite(entry.logprob) for entry in entries],
                "top_logprobs": tops}

    def chat(self, entries: Iterable[TokenLogprobs], num_top: int) -> dict[str, Any]:
        """The chat shape. num_top: how many of the likeliest tokens to name."""
        content = []
        for entry in entries:
            top = list(zip(entry.top_ids, entry.top_logprobs))[:num_top]
            content.append({**self._token(entry.token_id, entry.logprob),
                            "top_logprobs": [self._token(token_id, value) for token_id, value in top]})
            self._move_past(entry.token_id)
        return {"content": content, "refusal": None}

    def prompt(self, token_ids: Sequence[int],
               entries: Sequence[TokenLogprobs | None]) -> list[dict[str, Any] | None]:
        """vLLM's shape: for each prompt token a map from token id to its log-probability, rank and text."""
        written: list[dict[str, Any] | None] = []
        for token_id, entry in zip(token_ids, entries):
            written.append(None if entry is None else self._by_id(entry))
            self._move_past(token_id)
        return written

    # The same in slices, each of which is written when its turn comes.

    def chat_slices(self, entries: Sequence[TokenLogprobs], num_top: int) -> Iterator[list[dict[str, Any]]]:
        """The content of the chat shape, in slices."""
        return (self.chat(some, num_top)["content"] for some in sliced(entries, 1 + num_top))

    def name_slices(self, token_ids: Sequence[int]) -> Iterator[list[str]]:
        """The tokens of the completions shape, in slices."""
        for some in sliced(token_ids):
            names = []
            for token_id in some:
                names.append(self._name(token_id))
                self._move_past(token_id)
            yield names

    def top_slices(self, token_ids: Sequence[int],
                   entries: Sequence[TokenLogprobs | None]) -> Iterator[list[dict[str, float] | None]]:
        """The top log-probabilities of the completions shape, in slices. For another writer than the one of the
        names."""
        width = _width(entries)
        for some, theirs in zip(sliced(token_ids, width), _endless(sliced(entries, width))):
            yield self.completion(some, theirs, ())["top_logprobs"]

    def prompt_slices(self, token_ids: Sequence[int],
                      entries: Sequence[TokenLogprobs | None]) -> Iterator[list[dict[str, Any] | None]]:
        """vLLM's prompt shape, in slices."""
        width = _width(entries)
        for some, theirs in zip(sliced(token_ids, width), sliced(entries, width)):
            yield self.prompt(some, theirs)

    def text(self, token_id: int) -> str:
        """What the token adds to the text here; part of a character shows as U+FFFD."""
        if self._as_ids or self._context is None:
            return f"token_id:{token_id}"
        return self._context.text_of(token_id)

    def _move_past(self, token_id: int) -> None:
        if self._context is not None:
            self._context.move_past(token_id)

    def _name(self, token_id: int) -> str:
        """The text, or `bytes:` and its bytes where it is no whole text, as OpenAI's completions have it."""
        if self._as_ids or self._context is None:
            return f"token_id:{token_id}"
        raw = self._context.bytes_of(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(map(_byte_name, raw))

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        raw = None if self._context is None else list(self._context.bytes_of(token_id))
        return {"token": self.text(token_id), "logprob": _finite(logprob), "bytes": raw}

    def _by_name(self, entry: TokenLogprobs) -> dict[str, float]:
        """The token itself and the top ones, the likeliest first. Several tokens may have one text (<0x41> and A): the
        token itself, then the likeliest, is called by it, the others `token_id:N`, as those without a text."""
        name_of = {entry.token_id: self._name(entry.token_id)}
        taken = set(name_of.values())
        for token_id in entry.top_ids:
            if token_id not in name_of:
                name = self._name(token_id)
                name_of[token_id] = f"token_id:{token_id}" if name in taken or not name else name
                taken.add(name_of[token_id])
        logprobs = {**dict(zip(entry.top_ids, entry.top_logprobs)), entry.token_id: entry.logprob}
        return {name_of[token_id]: _finite(value) for token_id, value in logprobs.items()}

    def _by_id(self, entry: TokenLogprobs) -> dict[str, Any]:
        found = {str(entry.token_id): self._ranked(entry.token_id, entry.logprob, entry.rank)}
        for rank, (token_id, value) in enumerate(zip(entry.top_ids, entry.top_logprobs), start=1):
            found.setdefault(str(token_id), self._ranked(token_id, value, rank))
        return found

    def _ranked(self, token_id: int, logprob: float, rank: int) -> dict[str, Any]:
        return {"logprob": _finite(logprob), "rank": rank, "decoded_token": self.text(token_id)}


class ChoiceLogprobs:
    """The writers of a call's choices: one for the answer of each, which moves on with it."""

    def __init__(self, tokenizer: Tokenizer | None, *, as_ids: bool):
        self._tokenizer, self._as_ids = tokenizer, as_ids
        self._writers: dict[int, LogprobsWriter] = {}

    def of(self, choice: Completion) -> LogprobsWriter:
        """Stands behind what it has written of the choice's answer."""
        writer = self._writers.get(choice.index)
        if writer is None:
            writer = self._writers[choice.index] = self.behind_prompt(choice)
        return writer

    def behind_prompt(self, choice: Completion) -> LogprobsWriter:
        """Stands where the choice's answer begins."""
        return self._behind(choice.request.prompt_token_ids, choice.request.sampling)

    def of_prompt(self, choice: Completion) -> LogprobsWriter:
        """Stands at the beginning of the choice's prompt."""
        return self.at_start(choice.request.sampling)

    def at_start(self, sampling: SamplingParams) -> LogprobsWriter:
        """Stands at the beginning of a text in which special tokens show as `sampling` says."""
        return self._behind((), sampling)

    def _behind(self, token_ids: Sequence[int], sampling: SamplingParams) -> LogprobsWriter:
        context = TextContext(self._tokenizer, token_ids, sampling) if self._tokenizer else None
        return LogprobsWriter(context, as_ids=self._as_ids)


def _width(entries: Sequence[TokenLogprobs | None]) -> int:
    return 1 + max((len(entry.top_ids) for entry in entries[:2] if entry is not None), default=0)


def _endless(slices: Iterator[Sequence[Any]]) -> Iterator[Sequence[Any]]:
    return itertools.chain(slices, itertools.repeat(()))


def finite_slices(entries: Sequence[TokenLogprobs | None]) -> Iterator[list[float | None]]:
    """The tokens' own log-probabilities in the completions shape, in slices."""
    return ([None if entry is None else _finite(entry.logprob) for entry in some] for some in sliced(entries))
@dataclass
class TokenPlaces:
    """Which tokens of one choice can be written with their offsets, piece after piece.

    Those behind text that is held back, because a stop string may begin with it, wait: if it does, the answer's text
    ends before them.
    """

    waiting: list[tuple[int, TokenLogprobs]] = field(default_factory=list)
    num_taken: int = 0
    num_chars: int = 0

    def take(self, piece: Piece, offsets: Sequence[int]) -> tuple[list[int], list[TokenLogprobs], Sequence[int]]:
        """The tokens whose offsets are certain behind this piece, their log-probabilities and offsets. offsets: of all
        the choice's tokens; empty if it has no text."""
        self.waiting += zip(piece.token_ids, piece.logprobs or ())
        self.num_chars += len(piece.text)
        placed = offsets[self.num_taken:self.num_taken + len(self.waiting)]
        num_certain = len(self.waiting)
        if piece.finish_reason is None:
            num_certain = next((i for i, offset in enumerate(placed) if offset > self.num_chars), num_certain)
        taken, self.waiting = self.waiting[:num_certain], self.waiting[num_certain:]
        self.num_taken += num_certain
        return [token_id for token_id, _ in taken], [entry for _, entry in taken], placed[:num_certain]


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)


def _byte_name(byte: int) -> str:
    return chr(byte) if 0x20 <= byte < 0x7F and byte != 0x5C else f"\\x{byte:02x}"
