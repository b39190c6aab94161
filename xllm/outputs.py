"""What users of `LLM` and `AsyncLLM` get back; the names and shapes are vLLM's.

All times are `time.monotonic()` seconds.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Logprob:
    """One candidate token at one position. `rank` 1 is the most likely token."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


LogprobsOfToken = dict[int, Logprob]  # the token itself first, then the top ones by rank


@dataclass(slots=True)
class CompletionOutput:
    """One of the `n` completions of a prompt.

    finish_reason: None while it runs, then 'stop', 'length', 'abort' or 'error'.
    stop_reason: the stop string or stop token id that ended it; None for eos.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[LogprobsOfToken] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: str | None = None

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestMetrics:
    """Times of a request and counts of its output, in `time.monotonic()` seconds; None: not yet."""

    arrival_time: float
    first_token_time: float | None = None
    last_token_time: float | None = None
    finished_time: float | None = None
    num_generation_tokens: int = 0
    num_preemptions: int = 0


@dataclass(slots=True)
class EmbeddingOutput:
    """A prompt and the vector that stands for it."""

    request_id: str
    prompt_token_ids: list[int]
    embedding: list[float]
    num_cached_tokens: int = 0


@dataclass(slots=True)
class RequestOutput:
    """A prompt and its completions, so far or in the end (`finished`).

    prompt: None when token ids were given. prompt_logprobs: one entry a prompt token, the first None.
    num_cached_tokens: prompt tokens whose KV was reused. cached_by_tier: the same by where it was (l1, l2: device,
    l3: host memory, l4: disk, l5: shared store); None before the first output.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    prompt_logprobs: list[LogprobsOfToken | None] | None = None
    num_cached_tokens: int = 0
    cached_by_tier: dict[str, int] | None = None
