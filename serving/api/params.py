"""Makes the engine's `Request`s of a request body: sampling parameters, limits, ids."""

from __future__ import annotations

import hashlib
import math
import time
import uuid
from collections.abc import Sequence
from typing import Any

from serving.api.call_weight import LOGPROB, affordable_tokens, check_weight
from serving.api.errors import invalid
from serving.api.state import ServerState
from serving.api.structured import check_structured
from serving.api.types import PASSED_ON, GenerationBody, PoolingBody
from serving.observe.call import CALL, REQUEST_ID
from serving.security.caller import CALLER, signature
from xllm.pooling import PoolingParams
from xllm.request import MAX_CHOICES, Request, SamplingParams, check_number
from xllm.token_ids import check_prompt_length

COMPLETION_MAX_TOKENS = 16  # OpenAI's default for completions
# Making a sequence counts as so many characters of text (`text_work.py: LONG`). Chosen: 64 of them are worth a thread.
SEQUENCE_SIZE = 64
MAX_SALT_CHARS = 1024  # chosen: a salt is an id or a digest


def choose_max_tokens(state: ServerState, asked: int | None, num_prompt_tokens: int, *, default: int | None,
                      prompt_field: str, asked_field: str = "max_tokens", affordable: int | None = None) -> int:
    """How many tokens to generate. Raises RequestError or ApiError if the prompt, or prompt and output, exceed
    the model's length.

    default: used when nothing is asked for, cut to what fits and is affordable; None: all of that.
    """
    longest = state.facts.max_model_len
    room = longest - num_prompt_tokens
    check_prompt_length(num_prompt_tokens, longest, prompt_field)
    if asked is None:
        return min(room, default or room, affordable or room)
    if asked > room:
        raise invalid(f"{asked_field} is {asked}, but after the {num_prompt_tokens} tokens of the prompt only {room} "
                      f"fit (the model's longest sequence is {longest})", asked_field)
    return asked


def check_fan_out(state: ServerState, body: GenerationBody, num_prompts: int) -> int:
    """The checked `n`. Raises RequestError or ApiError when one call asks for too many sequences."""
    n = 1 if body.n is None else body.n
    check_number("n", n, 1, MAX_CHOICES, whole=True)
    limit = state.config.limits.max_sequences_per_request
    if n * num_prompts > limit:
        raise invalid(f"{num_prompts} prompts times n={n} is more than {limit} sequences in one request", "n")
    return n


def call_id(body: GenerationBody | PoolingBody, prefix: str, header: str | None) -> str:
    """The id of this call: the caller's own if it brings one, in the body or as X-Request-Id. Raises ApiError if that
    is malformed."""
    call = CALL.get()
    given = body.request_id if body.request_id is not None else header
    if given is None:
        return f"{prefix}-{uuid.uuid4().hex if call is None else call.request_id}"
    if not REQUEST_ID.fullmatch(given):
        raise invalid("request_id must be 1 to 128 letters, digits, '_', '-', '.' or ':'", "request_id")
    if call is not None:
        call.rename(given)
    return given if given.startswith(prefix + "-") else f"{prefix}-{given}"


def pooling_requests(state: ServerState, body: PoolingBody, call: str, prompts: Sequence[list[int]],
                     sampling: SamplingParams, pooling: PoolingParams, prompt_field: str) -> list[Request]:
    """One `Request` per text, for its embedding. Raises RequestError or ApiError."""
    check_weight(state, list(map(len, prompts)), [sampling] * len(prompts), prompt_field=prompt_field,
                 embedding_size=state.facts.hidden_size)
    options = _request_options(state, body)
    return [request for prompt in prompts
            for request in state.inputs.requests(call, prompt, sampling, pooling=pooling, **options)]


def plain_requests(state: ServerState, body: PoolingBody, call: str, prompts: Sequence[list[int]],
                   sampling: SamplingParams) -> list[Request]:
    """One `Request` per text, all sampled alike. Raises RequestError or ApiError."""
    check_weight(state, list(map(len, prompts)), [sampling] * len(prompts))
    options = _request_options(state, body)
    return [request for prompt in prompts for request in state.inputs.requests(call, prompt, sampling, **options)]


async def engine_requests(
        state: ServerState, body: GenerationBody, call: str, prompts: Sequence[Sequence[int]], *, n: int,
        max_tokens: int | None, default: int | None, logprobs: int | None, prompt_field: str = "prompt",
        max_tokens_field: str = "max_tokens", logprobs_field: str = "logprobs", logprob_weight: int = LOGPROB,
        num_echoed: int = 0, **settings: Any) -> list[Request]:
    """One `Request` per prompt and choice, in the order of the choices: sampled as the body says, weighed, and signed.

    max_tokens: as it was asked for; default: where it was not, see `choose_max_tokens`. logprobs: how many, None: none.
    The fields' names are those of the API, for what is refused. logprob_weight, num_echoed: see `check_weight`.
    settings: sampling parameters over the body's.

    Raises:
        RequestError, ApiError: naming the field.
    """
    lengths = list(map(len, prompts))
    affordable = affordable_tokens(state, n * len(prompts), logprobs, logprob_weight)
    longest = [choose_max_tokens(state, max_tokens, length, default=default, prompt_field=prompt_field,
                                 asked_field=max_tokens_field, affordable=affordable) for length in lengths]
    samplings = _samplings(state, body, n, longest, {"logprobs": logprobs, **settings})
    check_weight(state, lengths, samplings, prompt_field=prompt_field, max_tokens_field=max_tokens_field,
                 logprobs_field=logprobs_field, num_echoed=num_echoed, logprob=logprob_weight)
    await check_structured(state, body, samplings)
    options = _request_options(state, body)

    def make() -> list[Request]:
        # Every choice shows its prompt's logprobs when it comes, so every one of them computes them.
        return [request for prompt, sampling in zip(prompts, samplings, strict=True)
                for request in state.inputs.requests(call, prompt, sampling, shares_prompt_logprobs=False, **options)]

    return await state.text_work.run(
        max(sum(map(len, body.bad_words or ())), sum(lengths), SEQUENCE_SIZE * len(prompts) * n), make)


def _samplings(state: ServerState, body: GenerationBody, n: int, lengths: Sequence[int],
               settings: dict[str, Any]) -> list[SamplingParams]:
    """One for each prompt, alike but for `max_tokens`: the body's wishes over the model's defaults; settings: over
    both. Raises RequestError naming the field."""
    given = {name: value for name in PASSED_ON if (value := getattr(body, name)) is not None}
    defaults = {name: value for name, value in state.sampling_defaults.items() if name != "max_tokens"}
    settings = {**defaults, **given, **settings}
    if state.tokenizer is None:
        for name in ("stop", "bad_words"):
            if settings.get(name):
                state.need_tokenizer(name)
    first = SamplingParams(n=n, max_tokens=lengths[0], detokenize=state.tokenizer is not None, **settings)
    made = {length: first.varied(max_tokens=length) for length in set(lengths) - {lengths[0]}}
    return [made.get(length, first) for length in lengths]


def _request_options(state: ServerState, body: GenerationBody | PoolingBody) -> dict[str, Any]:
    """What a body says about its requests beside prompt and sampling, and whose they are. Raises ApiError or
    RequestError."""
    if body.cache_salt is not None and not 0 < len(body.cache_salt) <= MAX_SALT_CHARS:
        raise invalid(f"cache_salt must have 1 to {MAX_SALT_CHARS} characters", "cache_salt")
    for name in ("session_id", "prompt_cache_key"):
        if len(getattr(body, name) or "") > MAX_SALT_CHARS:
            raise invalid(f"{name} may have at most {MAX_SALT_CHARS} characters", name)
    return {"priority": body.priority, "offline": body.offline, "deadline_s": _deadline_s(body.ttlt_slo_ms),
            "session_id": body.session_id or body.prompt_cache_key, "lora": state.adapter_of(body.model),
            **signature(CALLER.get(), body.priority, _hash_salt(body.cache_salt))}


def _deadline_s(wish_ms: float | None) -> float | None:
    if wish_ms is None:
        return None
    if not 0 < wish_ms < math.inf:
        raise invalid("ttlt_slo_ms must be a positive number", "ttlt_slo_ms")
    return time.monotonic() + wish_ms / 1000


def _hash_salt(salt: str | None) -> str:
    """A digest of the salt, so that a long one costs nothing later."""
    return "" if salt is None else hashlib.sha256(salt.encode()).hexdigest()
