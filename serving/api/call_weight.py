"""Computes what a call weighs before the engine gets it, so that no call costs more than the limit on its weight.

A weight is in bytes: about what a call makes both processes hold at once, and work is weighed by the bytes whose making
takes as long. Every field that is multiplied by sequences or tokens has its place here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from serving.api.errors import invalid
from serving.api.state import ServerState
from xllm.request import SamplingParams

# Bytes, chosen as upper estimates of what both processes hold; powers of two unless an object's size is plain.
SEQUENCE = 2**13  # a request, its record, its row and the reader of its text
PROMPT_TOKEN, PROMPT_COPY = 72, 4  # once in a call, and again for each choice
OUTPUT_TOKEN = 16  # of each choice
LOGPROB, PROMPT_LOGPROB = 128, 160  # one token's at one place; two more stand for the place itself
KEPT_LOGPROB = 1024  # where an answer is kept for later calls, as objects
STOP_CHAR, STOP_OF_SEQUENCE = 16, 256  # the automaton's table; the state of each sequence
BAD_WORD_CHAR, BAD_WORD_OF_SEQUENCE = 512, 64  # tokenised, checked and sorted
ALLOWED_ID, BIAS, BIAS_OF_SEQUENCE = 128, 512, 64  # an id of a list; of a mapping, once and for each sequence
ECHO_CHAR = 4  # as Python stores the widest characters
EMBEDDING_NUMBER = 64  # of a vector


@dataclass(frozen=True)
class Term:
    """What a field weighs. what: its numbers, to be read after its name."""

    field: str
    weight: int
    what: str


def _terms(prompts: Sequence[int], samplings: Sequence[SamplingParams], *, prompt_field: str = "prompt",
           max_tokens_field: str = "max_tokens", logprobs_field: str = "logprobs", num_echoed: int = 0,
           logprob: int = LOGPROB, embedding_size: int = 0) -> list[Term]:
    """Of all fields; see `check_weight`."""
    one, num_prompt = samplings[0], sum(prompts)
    num = one.n * len(prompts)
    num_tokens = one.n * sum(sampling.max_tokens or 0 for sampling in samplings)
    times = f"{num} sequences"
    found = [
        Term("n" if one.n > 1 else prompt_field, num * SEQUENCE, times),
        Term(prompt_field, num_prompt * (PROMPT_TOKEN + one.n * PROMPT_COPY), f"{num_prompt} prompt tokens"),
        Term(max_tokens_field, num_tokens * OUTPUT_TOKEN, f"{num_tokens} tokens of {times}"),
        Term("echo", one.n * num_echoed * ECHO_CHAR, f"{one.n} times {num_echoed} characters"),
        Term(prompt_field, num * embedding_size * EMBEDDING_NUMBER, f"{num} vectors of {embedding_size} numbers"),
    ]
    if one.logprobs is not None:
        found.append(Term(logprobs_field, num_tokens * (2 + one.logprobs) * logprob,
                          f"{num_tokens} tokens of {times} with {one.logprobs} others each"))
    if one.prompt_logprobs is not None:
        num_places = one.n * num_prompt
        found.append(Term("prompt_logprobs", num_places * (2 + one.prompt_logprobs) * PROMPT_LOGPROB,
                          f"{num_places} prompt tokens with {one.prompt_logprobs} others each"))
    return found + _lists(one, num)


def _lists(sampling: SamplingParams, num: int) -> list[Term]:
    """The weights of fields that are lists, for `num` sequences."""
    times, found = f"for {num} sequences", list[Term]()
    if sampling.stop:
        num_chars, longest = sum(map(len, sampling.stop)), max(map(len, sampling.stop))
        found.append(Term("stop", num_chars * STOP_CHAR + num * (len(sampling.stop) * STOP_OF_SEQUENCE + 2 * longest),
                          f"{len(sampling.stop)} strings of {num_chars} characters {times}"))
    if sampling.bad_words:
        num_words, num_chars = len(sampling.bad_words), sum(map(len, sampling.bad_words))
        found.append(Term("bad_words", num_chars * BAD_WORD_CHAR + num * num_words * BAD_WORD_OF_SEQUENCE,
                          f"{num_words} words of {num_chars} characters {times}"))
    if sampling.allowed_token_ids:
        num_ids = len(sampling.allowed_token_ids)
        found.append(Term("allowed_token_ids", num_ids * ALLOWED_ID, f"{num_ids} ids"))
    if sampling.logit_bias:
        num_ids = len(sampling.logit_bias)
        found.append(Term("logit_bias", num_ids * (BIAS + num * BIAS_OF_SEQUENCE), f"{num_ids} tokens {times}"))
    return found


def check_weight(state: ServerState, prompts: Sequence[int], samplings: Sequence[SamplingParams],
                 **more: Any) -> None:
    """Raise ApiError 400 for a call that weighs more than one may, naming the field that weighs most.

    prompts: their lengths in tokens; samplings: one for each. more: prompt_field, max_tokens_field and logprobs_field
    say how this API calls those; num_echoed: characters; logprob: weight of one; embedding_size: numbers of a vector.
    """
    terms, limit = _terms(prompts, samplings, **more), state.config.limits.max_call_weight
    total = sum(term.weight for term in terms)
    if total <= limit:
        return
    by_field: dict[str, int] = {}
    for term in terms:
        by_field[term.field] = by_field.get(term.field, 0) + term.weight
    field = max(by_field, key=lambda name: by_field[name])
    heaviest = max((term for term in terms if term.field == field), key=lambda term: term.weight)
    raise invalid(f"{field}: the call weighs {total} bytes, and a call may weigh at most {limit} (max_call_weight); "
                  f"{heaviest.what} weigh {heaviest.weight} of them", field)


def affordable_tokens(state: ServerState, num_sequences: int, logprobs: int | None, logprob: int = LOGPROB) -> int:
    """How many tokens a sequence gets where the request does not say it: as many as let the answers take half of what a
    call may weigh."""
    weight = OUTPUT_TOKEN + (0 if logprobs is None else (2 + logprobs) * logprob)
    return max(1, state.config.limits.max_call_weight // 2 // (num_sequences * weight))


def check_texts(state: ServerState, texts: Iterable[str], field: str) -> None:
    """Raise ApiError 400 for a text that is too long to be tokenised; texts that the model's context can take never
    are."""
    longest = max_text_chars(state)
    for text in texts:
        if len(text) > longest:
            raise invalid(f"{field} has a text of {len(text)} characters, more than {longest}", field)


def max_text_chars(state: ServerState) -> int:
    """The longest text in characters: the limit, or eight for each token of the model's longest sequence if that is
    more."""
    return max(state.config.limits.max_text_chars, 8 * state.facts.max_model_len)
