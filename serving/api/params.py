"""Makes the engine's `Request`s of a request body: sampling parameters, limits, ids."""

from __future__ import annotations

import hashlib
import math
import time
import uuid
from collections.abc import Sequence
from typing import Any

from serving.api.call_weight import PlannedCall, check_weight
from serving.api.errors import invalid
from serving.api.state import ServerState
from serving.api.structured import check_structured
from serving.api.types import PASSED_ON, GenerationBody, PoolingBody
from serving.observe.call import CALL, REQUEST_ID
from xllm.pooling import PoolingParams
from xllm.request import Request, SamplingParams
from xllm.token_ids import check_prompt_length

COMPLETION_MAX_TOKENS = 16  # OpenAI's default for completions
# Making a sequence counts as so many characters of text (`text_work.py: LONG`). Chosen: 64 of them are worth a thread.
SEQUENCE_SIZE = 64
MAX_SALT_CHARS = 1024  # chosen: a salt is an id or a digest


def sampling_params(state: ServerState, body: GenerationBody, *, max_tokens: int, logprobs: int | None,
                    **overrides: Any) -> SamplingParams:
    """The body's parameters over the model's defaults; overrides: over both. Raises RequestError naming the field."""
    given = {name: value for name in PASSED_ON if (value := getattr(body, name)) is not None}
    defaults = {name: value for name, value in state.sampling_defaults.items() if name != "max_tokens"}
    settings: dict[str, Any] = {**defaults, **given, "max_tokens": max_tokens, "logprobs": logprobs, **overrides}
    if state.tokenizer is None:
        for name in ("stop", "bad_words"):
            if settings.get(name):
                state.need_tokenizer(name)
    return SamplingParams(n=1 if body.n is None else body.n, detokenize=state.tokenizer is not None, **settings)


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
    """The checked `n`. Raises ApiError when one call asks for too many sequences."""
    n = SamplingParams(n=1 if body.n is None else body.n).n
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
    check_weight(state, PlannedCall(list(map(len, prompts)), [sampling] * len(prompts), prompt_field=prompt_field,
                                    embedding_size=state.facts.hidden_size))
    options = _request_options(state, body)
    return [request for prompt in prompts
            for request in state.inputs.process(call, prompt, sampling, pooling=pooling, **options).requests]


def plain_requests(state: ServerState, body: PoolingBody, call: str, prompts: Sequence[list[int]],
                   sampling: SamplingParams) -> list[Request]:
    """One `Request` per text, all sampled alike. Raises RequestError or ApiError."""
    check_weight(state, PlannedCall(list(map(len, prompts)), [sampling] * len(prompts)))
    options = _request_options(state, body)
    return [request for prompt in prompts
            for request in state.inputs.process(call, prompt, sampling, **options).requests]


async def engine_requests(state: ServerState, body: GenerationBody, call: str, prompts: Sequence[Sequence[int]],
                          samplings: Sequence[SamplingParams], weighed: PlannedCall) -> list[Request]:
    """One `Request` per prompt and choice, in the order of the choices. Raises RequestError or ApiError."""
    check_weight(state, weighed)
    await check_structured(state, body, samplings)
    size = max(sum(map(len, body.bad_words or ())), sum(map(len, prompts)),
               SEQUENCE_SIZE * len(prompts) * samplings[0].n)
    return await state.text_work.run(size, lambda: _engine_requests(state, body, call, prompts, samplings))


def _engine_requests(state: ServerState, body: GenerationBody, call: str, prompts: Sequence[Sequence[int]],
                     samplings: Sequence[SamplingParams]) -> list[Request]:
    options = _request_options(state, body)
    requests: list[Request] = []
    for prompt, sampling in zip(prompts, samplings, strict=True):
        # Every choice shows its prompt's logprobs when it comes, so every one of them computes them.
        requests += state.inputs.process(call, prompt, sampling, shares_prompt_logprobs=False, **options).requests
    return requests


def _request_options(state: ServerState, body: GenerationBody | PoolingBody) -> dict[str, Any]:
    """What a body says about its requests beside prompt and sampling. Raises ApiError."""
    if body.cache_salt is not None and not 0 < len(body.cache_salt) <= MAX_SALT_CHARS:
        raise invalid(f"cache_salt must have 1 to {MAX_SALT_CHARS} characters", "cache_salt")
    for name in ("session_id", "prompt_cache_key"):
        if len(getattr(body, name) or "") > MAX_SALT_CHARS:
            raise invalid(f"{name} may have at most {MAX_SALT_CHARS} characters", name)
    return {"priority": body.priority, "offline": body.offline, "deadline_s": _deadline_s(body.ttlt_slo_ms),
            "cache_salt": _hash_salt(body.cache_salt), "session_id": body.session_id or body.prompt_cache_key,
            "lora": state.adapter_of(body.model)}


def _deadline_s(wish_ms: float | None) -> float | None:
    if wish_ms is None:
        return None
    if not 0 < wish_ms < math.inf:
        raise invalid("ttlt_slo_ms must be a positive number", "ttlt_slo_ms")
    return time.monotonic() + wish_ms / 1000


def _hash_salt(salt: str | None) -> str:
    """A digest of the salt, so that a long one costs nothing later."""
    return "" if salt is None else hashlib.sha256(salt.encode()).hexdigest()
