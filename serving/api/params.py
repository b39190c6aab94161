"""From a request body to the engine's `Request`s: sampling parameters, limits, ids."""

from __future__ import annotations

import hashlib
import re
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from serving.api.errors import invalid
from serving.api.types import GenerationBody
from serving.state import ServerState
from xllm.request import MAX_BAD_WORDS, Request, SamplingParams

if TYPE_CHECKING:
    from xllm.tokenizer import Tokenizer

COMPLETION_MAX_TOKENS = 16
_PASSED_ON = (
    "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "seed",
    "min_tokens", "stop", "stop_token_ids", "bad_words", "include_stop_str_in_output", "ignore_eos",
    "skip_special_tokens", "logit_bias", "allowed_token_ids", "prompt_logprobs",
)
_REQUEST_ID = re.compile(r"[\w.:\-]{1,128}", re.ASCII)
MAX_PRIORITY = 2**31
MAX_SALT_CHARS = 1024


def sampling_params(state: ServerState, body: GenerationBody, *, max_tokens: int, logprobs: int | None,
                    **overrides: Any) -> SamplingParams:
    """The body's wishes over the model's defaults. Raises RequestError naming the field."""
    given = {name: value for name in _PASSED_ON if (value := getattr(body, name)) is not None}
    defaults = {name: value for name, value in state.sampling_defaults.items() if name != "max_tokens"}
    settings: dict[str, Any] = {**defaults, **given, "max_tokens": max_tokens, "logprobs": logprobs, **overrides}
    if state.tokenizer is None:
        settings["detokenize"] = False
        for name in ("stop", "bad_words"):
            if settings.get(name):
                state.need_tokenizer(name)
    elif settings.get("bad_words"):
        settings["bad_words_token_ids"] = bad_word_ids(state.tokenizer, settings["bad_words"])
    sampling = SamplingParams(**settings)
    sampling.check_vocabulary(state.ready.vocab_size)
    return sampling


def bad_word_ids(tokenizer: Tokenizer, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Each word's token ids as it stands at the start of a text and, where that differs, after a space."""
    if len(words) > MAX_BAD_WORDS:
        raise invalid(f"bad_words may have at most {MAX_BAD_WORDS} entries", "bad_words")
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        if not word.strip():
            raise invalid("bad_words must not be empty", "bad_words")
        for text in (word, " " + word.lstrip()):
            found[tuple(tokenizer.encode(text, add_special_tokens=False, field="bad_words"))] = None
    return tuple(found)[:MAX_BAD_WORDS]


def choose_max_tokens(state: ServerState, asked: int | None, num_prompt_tokens: int, *, default: int | None,
                      prompt_field: str, asked_field: str = "max_tokens") -> int:
    """How many tokens to generate. Raises ApiError if the prompt, or prompt and output, exceed the model's length.

    default: used when nothing is asked for, cut to what fits; None: all that fits.
    """
    longest = state.ready.max_model_len
    room = longest - num_prompt_tokens
    if num_prompt_tokens < 1:
        raise invalid(f"{prompt_field} must not be empty", prompt_field)
    if room < 1:
        raise invalid(f"{prompt_field} has {num_prompt_tokens} tokens; the model's longest sequence is {longest}, "
                      "output included", prompt_field)
    if asked is None:
        return min(room, default or room)
    if asked > room:
        raise invalid(f"{asked_field} is {asked}, but after the {num_prompt_tokens} tokens of the prompt only {room} "
                      f"fit (the model's longest sequence is {longest})", asked_field)
    return asked


def check_fan_out(state: ServerState, body: GenerationBody, num_prompts: int) -> int:
    """The checked `n`. Raises ApiError when one call asks for too many sequences."""
    n = SamplingParams(n=1 if body.n is None else body.n).n
    limit = state.config.limits.max_sequences_per_request
    if n * num_prompts > limit:
        raise invalid(f"{num_prompts} prompts times n={n} is more than {limit} sequences in one request", "n")
    return n


def call_id(body: GenerationBody, prefix: str, header: str | None) -> str:
    """The id of this call: the caller's own if it brings one. Raises ApiError if that is malformed."""
    given = body.request_id if body.request_id is not None else header
    if given is None:
        return f"{prefix}-{uuid.uuid4().hex}"
    if not _REQUEST_ID.fullmatch(given):
        raise invalid("request_id must be 1 to 128 letters, digits, '_', '-', '.' or ':'", "request_id")
    return given if given.startswith(prefix + "-") else f"{prefix}-{given}"


def engine_requests(state: ServerState, body: GenerationBody, call: str, prompts: Sequence[Sequence[int]],
                    samplings: Sequence[SamplingParams], n: int) -> list[Request]:
    """One `Request` per prompt and choice, in the order of the choices."""
    if abs(body.priority) > MAX_PRIORITY:
        raise invalid(f"priority must be within {MAX_PRIORITY} of zero", "priority")
    if body.cache_salt is not None and not 0 < len(body.cache_salt) <= MAX_SALT_CHARS:
        raise invalid(f"cache_salt must have 1 to {MAX_SALT_CHARS} characters", "cache_salt")
    now = time.monotonic()
    requests = []
    for prompt, sampling in zip(prompts, samplings, strict=True):
        for choice in range(n):
            requests.append(Request(
                request_id=f"{call}-{len(requests)}", prompt_token_ids=prompt, sampling=_seeded(sampling, choice),
                eos_token_ids=state.ready.eos_token_ids, arrival_s=now, priority=body.priority, offline=body.offline,
                cache_salt=hash_salt(body.cache_salt),
            ))
    return requests


def hash_salt(salt: str | None) -> str:
    """A fixed-size stand-in, so that a long salt costs nothing later."""
    return "" if salt is None else hashlib.sha256(salt.encode()).hexdigest()


def _seeded(sampling: SamplingParams, choice: int) -> SamplingParams:
    """Choices of one seeded request differ, and each is reproducible."""
    if sampling.seed is None or choice == 0:
        return sampling
    return replace(sampling, seed=(sampling.seed + choice) % 2**63)
