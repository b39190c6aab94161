"""`Request`, the engine's input: token ids and `SamplingParams`; and `OutputDelta`, what comes back of it.

Nothing here knows text: tokenising happens before a `Request` is made, detokenising after its `OutputDelta`s come back.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from xllm.errors import RequestError
from xllm.kv_offer import KVOffer
from xllm.pooling import PoolingParams
from xllm.structured.spec import KINDS, StructuredOutput

# Limits of a request; `serving/limits.py` and docs/limits.md name the flags that lower or raise them over HTTP. Chosen,
# not measured: each is beyond what clients send, and bounds what one request can cost beside its tokens.
MAX_LOGPROBS = 64  # top log-probabilities of a token; OpenAI's limit is 20
MAX_STOP_STRINGS = 64  # OpenAI's limit is 4
MAX_STOP_TOKEN_IDS = 256  # the scheduler compares each sampled token with all of a row's
MAX_BAD_WORDS = 1024  # each is tokenised, with a blank before it and without
MAX_LOGIT_BIAS = 4096  # token ids
# Of a priority, either way: the moves of the KV tiers add twice as much, and stay below `kv/tiers.py: PREFETCH`.
MAX_PRIORITY = 2**31
MAX_CHOICES = 128  # sequences of one call; OpenAI's limit is 128
MAX_ALLOWED_TOKEN_IDS = 2**18  # more than any vocabulary has
MAX_STOP_STRING_CHARS = 4096  # of one: so much text may be held back
MAX_RENDERED_CHARS = 2**25  # that a chat template may make: more than the text of the longest prompt


class FinishReason(str, enum.Enum):
    """Why a request ended. `LENGTH` and `STOP` are OpenAI's words; the others are ours. `HANDED_OVER`: it goes on at
    another instance; no caller of the API sees it."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"
    HANDED_OVER = "handed_over"


# Why a request ends with `ERROR` by what it asked for itself: the engine works, and other requests go on.
FORM_CANNOT_GO_ON = "the structured output cannot go on"
NO_TOKEN_LEFT = "no token is left after structured output, allowed_token_ids, bad_words, logit_bias and min_tokens"
EDITED_AWAY = "repetition_penalty is so small that logits are not finite any more"
OWN_FAULTS = (FORM_CANNOT_GO_ON, NO_TOKEN_LEFT, EDITED_AWAY)


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose tokens; the names and defaults are vLLM's. Checked when made.

    Raises:
        RequestError: a value is out of range; `.field` names it.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 or -1: all tokens
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int | None = 16  # None: up to the model's length
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    bad_words: tuple[str, ...] = ()
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()  # made of bad_words by `InputProcessor`
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: tuple[int, ...] | None = None
    structured: StructuredOutput | None = None  # the form that the output must have
    skip_special_tokens: bool = True
    detokenize: bool = True

    def __post_init__(self) -> None:
        has_collections = self.has_collections  # most have none
        if has_collections:
            _freeze_sequences(self)
        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)
        _check_numbers(self)
        if has_collections:
            _check_collections(self)

    @property
    def needs_history(self) -> bool:
        """Whether logits depend on the tokens already produced."""
        return bool(
            self.presence_penalty
            or self.frequency_penalty
            or self.repetition_penalty != 1.0
            or self.bad_words_token_ids
        )

    def varied(self, **changes: Any) -> SamplingParams:
        """A copy with other values. Collections that are not named are shared with it and not checked again, nor is one
        that is: they may be large, and a call may have a thousand sequences. Raises RequestError."""
        made = object.__new__(SamplingParams)
        made.__dict__.update(self.__dict__, **changes)
        _check_numbers(made, changes)
        return made

    @property
    def has_collections(self) -> bool:
        """Whether any field holds a collection or text, which may be large."""
        return any(getattr(self, name) is not getattr(SamplingParams, name) for name in COLLECTIONS)

    def without_collections(self) -> SamplingParams:
        """A copy without its collections, for records of past requests: it is small."""
        if not self.has_collections:
            return self
        return self.varied(**{name: getattr(SamplingParams, name) for name in COLLECTIONS})

    def shares_collections(self, other: SamplingParams) -> bool:
        """Whether the collections of both are the same objects."""
        return all(getattr(self, name) is getattr(other, name) for name in COLLECTIONS)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise RequestError if a token id named here lies outside [0, vocab_size)."""
        named: dict[str, Sequence[int]] = {
            "logit_bias": tuple(self.logit_bias or ()),
            "allowed_token_ids": self.allowed_token_ids or (),
            "stop_token_ids": self.stop_token_ids,
            "bad_words": tuple(t for word in self.bad_words_token_ids for t in word),
        }
        for name, token_ids in named.items():
            if not token_ids or (min(token_ids) >= 0 and max(token_ids) < vocab_size):
                continue
            for token_id in token_ids:
                if not 0 <= token_id < vocab_size:
                    raise RequestError(f"{name}: token id {token_id} is outside the vocabulary "
                                       f"(0 to {vocab_size - 1})", field=name)


def _freeze_sequences(p: SamplingParams) -> None:
    """Turn lists (and a lone stop string) into tuples, so that the dataclass is immutable."""
    if isinstance(p.structured, Mapping):
        object.__setattr__(p, "structured", _structured(p.structured))
    for name in ("stop", "bad_words"):
        value = getattr(p, name)
        if value is None:
            value = ()
        elif isinstance(value, str):
            value = (value,)
        object.__setattr__(p, name, tuple(value))
    object.__setattr__(p, "stop_token_ids", tuple(p.stop_token_ids or ()))
    object.__setattr__(p, "bad_words_token_ids", tuple(tuple(w) for w in p.bad_words_token_ids))
    if p.allowed_token_ids is not None:
        object.__setattr__(p, "allowed_token_ids", tuple(p.allowed_token_ids))
    if p.logit_bias is not None:
        object.__setattr__(p, "logit_bias", _int_keys(p.logit_bias))


def _structured(fields: Mapping[str, Any]) -> StructuredOutput:
    known = (*KINDS, "after")
    if unknown := fields.keys() - set(known):
        raise RequestError(f"structured: unknown key {min(unknown)!r}; known are {', '.join(known)}",
                           field="structured")
    return StructuredOutput(**fields)


def _int_keys(bias: Mapping[Any, float]) -> dict[int, float]:
    try:
        return {int(k): float(v) for k, v in bias.items()}
    except (TypeError, ValueError, OverflowError):
        raise RequestError("logit_bias: keys must be token ids and values numbers", field="logit_bias") from None


# Of each number: the least and the most that it may be, whether it is an integer, and whether the least is out.
_RANGES: dict[str, tuple[float, float, bool, bool]] = {
    "n": (1, MAX_CHOICES, True, False), "temperature": (0.0, 100.0, False, False), "top_p": (0.0, 1.0, False, True),
    "top_k": (0, 2**31 - 1, True, False), "min_p": (0.0, 1.0, False, False),
    "presence_penalty": (-2.0, 2.0, False, False), "frequency_penalty": (-2.0, 2.0, False, False),
    "repetition_penalty": (0.0, 100.0, False, True), "seed": (-(2**63), 2**64 - 1, True, False),
    "max_tokens": (1, 2**31 - 1, True, False), "min_tokens": (0, 2**31 - 1, True, False),
    "logprobs": (0, MAX_LOGPROBS, True, False), "prompt_logprobs": (0, MAX_LOGPROBS, True, False)}
_OPTIONAL = frozenset({"seed", "max_tokens", "logprobs", "prompt_logprobs"})


def _check_numbers(p: SamplingParams, names: Iterable[str] = tuple(_RANGES)) -> None:
    for name in names:
        if (known := _RANGES.get(name)) is None:
            continue
        value, (low, high, whole, low_open) = getattr(p, name), known
        if value is not getattr(SamplingParams, name) and (value is not None or name not in _OPTIONAL):
            check_number(name, value, low, high, whole=whole, low_open=low_open)
    if p.max_tokens is not None and p.min_tokens > p.max_tokens:
        raise RequestError(f"min_tokens ({p.min_tokens}) is larger than max_tokens ({p.max_tokens})",
                           field="min_tokens")


def check_number(name: str, value: Any, low: float, high: float, *, whole: bool = False,
                 low_open: bool = False) -> None:
    """Raise RequestError, naming the field, unless the value is a number from low (or above it) to high."""
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise RequestError(f"{name} must be {'an integer' if whole else 'a number'}, got {value!r}", field=name)
    if not ((low < value if low_open else low <= value) and value <= high):  # refuses NaN and infinities as well
        raise RequestError(f"{name} must be in {'(' if low_open else '['}{low}, {high}], got {value}", field=name)


def _check_collections(p: SamplingParams) -> None:
    limits = {"stop": MAX_STOP_STRINGS, "stop_token_ids": MAX_STOP_TOKEN_IDS, "bad_words": MAX_BAD_WORDS,
              "bad_words_token_ids": MAX_BAD_WORDS, "logit_bias": MAX_LOGIT_BIAS,
              "allowed_token_ids": MAX_ALLOWED_TOKEN_IDS}
    for name, limit in limits.items():
        if len(getattr(p, name) or ()) > limit:
            raise RequestError(f"{name} may have at most {limit} entries", field=name)
    for name in ("stop", "bad_words"):
        for text in getattr(p, name):
            if not isinstance(text, str) or not text or len(text) > MAX_STOP_STRING_CHARS:
                raise RequestError(f"{name} must be non-empty strings of at most {MAX_STOP_STRING_CHARS} "
                                   "characters", field=name)
    if p.structured is not None:
        if not isinstance(p.structured, StructuredOutput):
            raise RequestError("structured must be a StructuredOutput", field="structured")
        if p.ignore_eos:
            raise RequestError("ignore_eos does not go with a structured output, which ends where its form is complete",
                               field="ignore_eos")
    for name in ("stop_token_ids", "allowed_token_ids"):
        token_ids = getattr(p, name) or ()
        for token_id in () if set(map(type, token_ids)) <= {int} else token_ids:
            if isinstance(token_id, bool) or not isinstance(token_id, int):
                raise RequestError(f"{name} must be integers, got {token_id!r}", field=name)
    if p.allowed_token_ids is not None and not p.allowed_token_ids:
        raise RequestError("allowed_token_ids must not be empty", field="allowed_token_ids")
    for token_id, bias in (p.logit_bias or {}).items():
        if not -100.0 <= bias <= 100.0:  # also refuses NaN
            raise RequestError(f"logit_bias for token {token_id} must be in [-100, 100], got {bias}",
                               field="logit_bias")


@dataclass(frozen=True, slots=True)
class Column:
    """dtype: numpy's and torch's name. unused: what a place that is not sampled gets; with all of them the operator
    takes the largest logit."""

    dtype: str
    unused: float


@dataclass(frozen=True, kw_only=True)
class Request:
    """One sequence to generate. `n > 1` becomes n requests before it gets here.

    `generated_token_ids`: what another engine has drawn of its output already. The sequence goes on after them as if
    this engine had drawn them itself; only what comes after them is delivered, and prompt log-probabilities are not.
    `offer`: where its KV is to be sent; once it is all there the request ends with `HANDED_OVER`. `landing`: the number
    of the offer, made by this engine, under which its KV comes; it waits for that.
    `traceparent`: the W3C trace context that the spans of it belong to; an engine ignores it.
    `priority`: smaller runs first; one that is not within `MAX_PRIORITY` of zero raises RequestError. `offline`
    requests yield to online ones. `deadline_s` and `arrival_s` are on the `time.monotonic()` clock.
    """

    request_id: str
    prompt_token_ids: Sequence[int]  # as `token_ids.py:token_array` makes them where anybody waits
    sampling: SamplingParams = field(default_factory=SamplingParams)
    generated_token_ids: tuple[int, ...] = ()
    pooling: PoolingParams | None = None  # an embedding beside the one token that the request then is for
    eos_token_ids: tuple[int, ...] = ()
    arrival_s: float = 0.0
    priority: int = 0
    offline: bool = False
    deadline_s: float | None = None
    cache_salt: str = ""
    session_id: str | None = None  # of the conversation that it is a turn of
    lora: str = ""  # the adapter to compute with; none: the model as it is
    lora_slot: int = 0  # where the engine keeps it; filled in by the engine
    tenant: str = ""  # whose it is, for fair shares between them
    tenant_weight: float = 1.0  # of two tenants that both wait, the one with twice the weight gets twice the tokens
    traceparent: str | None = None
    offer: KVOffer | None = None
    landing: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.priority, bool) or not isinstance(self.priority, int):
            raise RequestError(f"priority must be an integer, got {self.priority!r}", field="priority")
        if abs(self.priority) > MAX_PRIORITY:
            raise RequestError(f"priority must be within {MAX_PRIORITY} of zero", field="priority")

    def varied(self, **changes: Any) -> Request:
        """A copy with other values, which are not checked."""
        made = object.__new__(Request)
        made.__dict__.update(self.__dict__, **changes)
        return made


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The log-probabilities of one position: the chosen token first, then the top ones by rank."""

    token_id: int
    logprob: float
    rank: int  # 1 = the most likely token
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


@dataclass(slots=True)
class OutputDelta:
    """What one step added to one request. The one with a `finish_reason` is the last.

    One is made per sequence and step, and it is what travels to whoever asked (`xllm/client`).
    """

    request_id: str
    token_ids: list[int]
    num_cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop token id or string that ended it
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_preemptions: int = 0
    error: str | None = None
    cached_by_tier: dict[str, int] | None = None  # the cached tokens by where they were: l1 to l5
    embedding: list[float] | None = None  # for a request with `pooling`


SAMPLING_FIELDS = tuple(f.name for f in fields(SamplingParams))
# Parameters that `OpSet.sample` takes as a column, a value a row, in the order of its arguments. The rest edits logits
# (`xllm/runner/logit_edits.py`) or decides what comes after the draw.
SAMPLING_COLUMNS = {"temperature": Column("float32", 0.0), "top_k": Column("int32", 0), "top_p": Column("float32", 1.0),
                    "min_p": Column("float32", 0.0)}
COLLECTIONS = ("stop", "stop_token_ids", "bad_words", "bad_words_token_ids", "logit_bias", "allowed_token_ids",
               "structured")
