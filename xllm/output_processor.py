"""`OutputProcessor`: the engine's `OutputDelta`s to text and `RequestOutput`s.

It detokenises, finds stop strings (and says which engine requests must end for them), and gathers
the `n` choices of a request. Single-threaded.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from xllm.detokenizer import Detokenizer
from xllm.inputs import ProcessedInput
from xllm.outputs import CompletionOutput, Logprob, LogprobsOfToken, RequestMetrics, RequestOutput
from xllm.request import FinishReason, OutputDelta, SamplingParams, TokenLogprobs
from xllm.tokenizer import Tokenizer


class Completion:
    """One choice as it grows. `finish_reason` is set once and ends it."""

    def __init__(self, index: int, sampling: SamplingParams, tokenizer: Tokenizer | None):
        self.index = index
        self.token_ids: list[int] = []
        self.logprobs: list[LogprobsOfToken] | None = None if sampling.logprobs is None else []
        self.cumulative_logprob: float | None = None if sampling.logprobs is None else 0.0
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.error: str | None = None
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer, sampling) if tokenizer and sampling.detokenize else None
        self._new_text: list[str] = []  # since the last `take_delta`
        self._num_taken = 0
        self._end_taken = False

    def apply(self, delta: OutputDelta) -> bool:
        """Take in a step's tokens. True: a stop string ended it, which the engine does not know yet."""
        num_kept, stopped = len(delta.token_ids), None
        if self._detokenizer is not None:
            num_kept, stopped = self._detokenise(self._detokenizer, delta)
        self.token_ids += delta.token_ids[:num_kept]
        if delta.logprobs is not None:
            for entry in delta.logprobs[:num_kept]:
                self._add_logprobs(entry)
        if stopped is not None:
            self.finish_reason, self.stop_reason = FinishReason.STOP.value, stopped
            return delta.finish_reason is None
        if delta.finish_reason is not None:
            self.finish_reason, self.stop_reason = delta.finish_reason.value, delta.stop_reason
            self.error = delta.error
        return False

    def _detokenise(self, detokenizer: Detokenizer, delta: OutputDelta) -> tuple[int, str | None]:
        """(how many of the new tokens count, the stop string that ended the text)."""
        text = detokenizer.feed(delta.token_ids, hide_last=delta.finish_reason is FinishReason.STOP)
        if delta.finish_reason is not None:
            text += detokenizer.finish()
        if text:
            self._new_text.append(text)
        return detokenizer.num_tokens - len(self.token_ids), detokenizer.stopped

    def _add_logprobs(self, entry: TokenLogprobs) -> None:
        if self.logprobs is not None and self.cumulative_logprob is not None:
            self.logprobs.append(logprobs_by_id(entry, self._tokenizer))
            self.cumulative_logprob += entry.logprob

    @property
    def has_news(self) -> bool:
        """Whether `take_delta` has anything to say."""
        ended = self.finish_reason is not None and not self._end_taken
        return ended or bool(self._new_text) or len(self.token_ids) > self._num_taken

    def output(self) -> CompletionOutput:
        """All so far. The lists are copies."""
        text = self._detokenizer.text if self._detokenizer else ""
        return self._output(text, 0)

    def take_delta(self) -> CompletionOutput:
        """What is new since the last call."""
        text, start = "".join(self._new_text), self._num_taken
        self._new_text.clear()
        self._num_taken = len(self.token_ids)
        self._end_taken = self.finish_reason is not None
        return self._output(text, start)

    def _output(self, text: str, start: int) -> CompletionOutput:
        return CompletionOutput(
            index=self.index, text=text, token_ids=self.token_ids[start:], cumulative_logprob=self.cumulative_logprob,
            logprobs=None if self.logprobs is None else self.logprobs[start:], finish_reason=self.finish_reason,
            stop_reason=self.stop_reason, error=self.error,
        )


@dataclass(slots=True)
class RequestState:
    """A prompt whose choices are running. Written by the `OutputProcessor` only."""

    source: ProcessedInput
    completions: list[Completion]
    metrics: RequestMetrics
    prompt_logprobs: list[LogprobsOfToken | None] | None = None
    num_cached_tokens: int = 0
    cached_by_tier: dict[str, int] | None = None
    embedding: list[float] | None = None
    num_unfinished: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_unfinished = len(self.completions)

    @property
    def finished(self) -> bool:
        return self.num_unfinished == 0

    def output(self) -> RequestOutput:
        """Everything so far."""
        return self._output([c.output() for c in self.completions])

    def take_delta(self) -> RequestOutput:
        """The choices with news since the last call, with only what is new in each."""
        return self._output([c.take_delta() for c in self.completions if c.has_news])

    def _output(self, outputs: list[CompletionOutput]) -> RequestOutput:
        return RequestOutput(
            request_id=self.source.request_id, prompt=self.source.prompt,
            prompt_token_ids=self.source.prompt_token_ids, outputs=outputs, finished=self.finished,
            metrics=self.metrics, prompt_logprobs=self.prompt_logprobs, num_cached_tokens=self.num_cached_tokens,
            cached_by_tier=self.cached_by_tier,
        )


class OutputProcessor:
    """Open requests by the ids under which the engine knows their choices."""

    def __init__(self, tokenizer: Tokenizer | None):
        self._tokenizer = tokenizer
        self._open: dict[str, tuple[RequestState, Completion]] = {}

    def add(self, source: ProcessedInput) -> RequestState:
        completions = [Completion(i, r.sampling, self._tokenizer) for i, r in enumerate(source.requests)]
        state = RequestState(source, completions, RequestMetrics(arrival_time=time.perf_counter()))
        self._open.update((r.request_id, (state, c)) for r, c in zip(source.requests, completions))
        return state

    def remove(self, state: RequestState) -> list[str]:
        """Forget a request; returns the engine ids that are still running. Their later deltas are ignored."""
        ids = [r.request_id for r in state.source.requests if r.request_id in self._open]
        for engine_id in ids:
            del self._open[engine_id]
        return ids

    @property
    def num_open(self) -> int:
        """Choices that have not ended."""
        return len(self._open)

    def process(self, deltas: Iterable[OutputDelta]) -> tuple[list[RequestState], list[str]]:
        """(requests that changed, each once; engine ids to abort because a stop string was found)."""
        now = time.perf_counter()
        changed: dict[int, RequestState] = {}
        to_abort: list[str] = []
        for delta in deltas:
            state, completion = self._open.get(delta.request_id, (None, None))
            if state is None or completion is None:  # aborted, or ended by a stop string
                continue
            num_before = len(completion.token_ids)
            if completion.apply(delta):
                to_abort.append(delta.request_id)
            self._account(state, delta, len(completion.token_ids) - num_before, now)
            if completion.finish_reason is not None:
                del self._open[delta.request_id]
                state.num_unfinished -= 1
                if state.finished:
                    state.metrics.finished_time = now
            changed[id(state)] = state
        return list(changed.values()), to_abort

    def _account(self, state: RequestState, delta: OutputDelta, num_tokens: int, now: float) -> None:
        metrics = state.metrics
        if num_tokens:
            if metrics.first_token_time is None:
                metrics.first_token_time = now
            metrics.last_token_time = now
            metrics.num_generation_tokens += num_tokens
        if delta.num_preemptions > metrics.num_preemptions:
            metrics.num_preemptions = delta.num_preemptions
        if delta.num_cached_tokens > state.num_cached_tokens:
            state.num_cached_tokens = delta.num_cached_tokens
        if delta.cached_by_tier is not None:
            state.cached_by_tier = delta.cached_by_tier
        if delta.embedding is not None:
            state.embedding = delta.embedding
        if delta.prompt_logprobs is not None:
            state.prompt_logprobs = [None if p is None else logprobs_by_id(p, self._tokenizer)
                                     for p in delta.prompt_logprobs]


def logprobs_by_id(entry: TokenLogprobs, tokenizer: Tokenizer | None) -> LogprobsOfToken:
    """The position's own token first, then the top ones by rank."""
    ids: Sequence[int] = (entry.token_id, *entry.top_ids)
    logprobs = (entry.logprob, *entry.top_logprobs)
    ranks = (entry.rank, *range(1, len(entry.top_ids) + 1))
    found: LogprobsOfToken = {}
    for token_id, logprob, rank in zip(ids, logprobs, ranks):
        if token_id not in found:
            text = tokenizer.token_text(token_id) if tokenizer else None
            found[token_id] = Logprob(logprob=logprob, rank=rank, decoded_token=text)
    return found
