"""`Answer`: the completions of one prompt as the objects that users of `LLM` and `AsyncLLM` get."""

from __future__ import annotations

from collections.abc import Sequence

from xllm.client.assemble import Completion
from xllm.errors import EngineDeadError
from xllm.inputs import ProcessedInput
from xllm.outputs import CompletionOutput, EmbeddingOutput, Logprob, LogprobsOfToken, RequestMetrics, RequestOutput
from xllm.request import TokenLogprobs
from xllm.text.token_text import TextContext
from xllm.text.tokenizer import Tokenizer


class Answer:
    """Reads the completions whenever it is asked; the lists that it gives are copies."""

    def __init__(self, source: ProcessedInput, completions: Sequence[Completion], tokenizer: Tokenizer | None):
        self.source = source
        self._tokenizer = tokenizer
        self._choices = [_Choice(index, completion, tokenizer) for index, completion in enumerate(completions)]
        self._completions = completions
        self._prompt_logprobs: list[LogprobsOfToken | None] | None = None

    @property
    def finished(self) -> bool:
        """Whether every completion has ended."""
        return all(completion.finish_reason is not None for completion in self._completions)

    def output(self) -> RequestOutput:
        """Everything so far."""
        return self._output([choice.output() for choice in self._choices])

    def take_delta(self) -> RequestOutput:
        """The choices with news since the last call, with only what is new in each."""
        return self._output([choice.take_delta() for choice in self._choices if choice.has_news])

    def embedding(self) -> EmbeddingOutput:
        """Of a request with `pooling` that has ended. Raises EngineDeadError if it did not end well."""
        (completion,) = self._completions
        if completion.embedding is None:
            raise EngineDeadError(f"no embedding came: {completion.error or completion.finish_reason}")
        return EmbeddingOutput(request_id=self.source.request_id, prompt_token_ids=self.source.prompt_token_ids,
                               embedding=completion.embedding, num_cached_tokens=completion.num_cached_tokens)

    def _output(self, outputs: list[CompletionOutput]) -> RequestOutput:
        by_tier = [c.cached_by_tier for c in self._completions if c.cached_by_tier is not None]
        return RequestOutput(
            request_id=self.source.request_id, prompt=self.source.prompt,
            prompt_token_ids=self.source.prompt_token_ids, outputs=outputs, finished=self.finished,
            metrics=self._metrics(), prompt_logprobs=self._read_prompt_logprobs(),
            num_cached_tokens=max(c.num_cached_tokens for c in self._completions),
            cached_by_tier=by_tier[-1] if by_tier else None)

    def _metrics(self) -> RequestMetrics:
        completions = self._completions
        return RequestMetrics(
            arrival_time=completions[0].request.arrival_s,
            first_token_time=min((c.first_token_s for c in completions if c.first_token_s is not None), default=None),
            last_token_time=max((c.last_token_s for c in completions if c.last_token_s is not None), default=None),
            finished_time=max(c.end_s or 0.0 for c in completions) if self.finished else None,
            num_generation_tokens=sum(len(c.token_ids) for c in completions),
            num_preemptions=max(c.num_preemptions for c in completions))

    def _read_prompt_logprobs(self) -> list[LogprobsOfToken | None] | None:
        entries = self._completions[0].prompt_logprobs  # only the first choice computes them; they come at once
        if self._prompt_logprobs is None and entries:
            context = TextContext(self._tokenizer, (), self.source.sampling) if self._tokenizer else None
            self._prompt_logprobs = []
            for token_id, entry in zip(self.source.prompt_token_ids, entries):
                self._prompt_logprobs.append(None if entry is None else logprobs_by_id(entry, context))
                if context is not None:
                    context.move_past(token_id)
        return self._prompt_logprobs


class _Choice:
    """One completion, and how much of it was taken."""

    def __init__(self, index: int, completion: Completion, tokenizer: Tokenizer | None):
        self._index, self._completion = index, completion
        request = completion.request
        self._logprobs: list[LogprobsOfToken] | None = None if request.sampling.logprobs is None else []
        self._context = (TextContext(tokenizer, request.prompt_token_ids, request.sampling)
                         if tokenizer and self._logprobs is not None else None)
        self._cumulative_logprob = 0.0
        self._num_tokens = self._num_chars = 0  # taken
        self._end_taken = False

    @property
    def has_news(self) -> bool:
        """Whether `take_delta` has anything to say."""
        completion = self._completion
        ended = completion.finish_reason is not None and not self._end_taken
        return ended or len(completion.token_ids) > self._num_tokens or len(completion.text) > self._num_chars

    def output(self) -> CompletionOutput:
        """All so far."""
        return self._output(0, 0)

    def take_delta(self) -> CompletionOutput:
        """What is new since the last call."""
        taken = self._num_tokens, self._num_chars
        self._num_tokens, self._num_chars = len(self._completion.token_ids), len(self._completion.text)
        self._end_taken = self._completion.finish_reason is not None
        return self._output(*taken)

    def _output(self, num_tokens: int, num_chars: int) -> CompletionOutput:
        """Without the first so many tokens and characters."""
        completion, logprobs = self._completion, self._read_logprobs()
        return CompletionOutput(
            index=self._index, text=completion.text[num_chars:], token_ids=completion.token_ids[num_tokens:],
            cumulative_logprob=None if logprobs is None else self._cumulative_logprob,
            logprobs=None if logprobs is None else logprobs[num_tokens:], finish_reason=completion.finish_reason,
            stop_reason=completion.stop_reason, error=completion.error)

    def _read_logprobs(self) -> list[LogprobsOfToken] | None:
        if self._logprobs is not None:
            for entry in self._completion.logprobs[len(self._logprobs):]:
                self._logprobs.append(logprobs_by_id(entry, self._context))
                self._cumulative_logprob += entry.logprob
                if self._context is not None:
                    self._context.move_past(entry.token_id)
        return self._logprobs


def logprobs_by_id(entry: TokenLogprobs, context: TextContext | None) -> LogprobsOfToken:
    """The position's own token first, then the top ones by rank. context: of the position; None: without texts."""
    ids: Sequence[int] = (entry.token_id, *entry.top_ids)
    logprobs = (entry.logprob, *entry.top_logprobs)
    ranks = (entry.rank, *range(1, len(entry.top_ids) + 1))
    found: LogprobsOfToken = {}
    for token_id, logprob, rank in zip(ids, logprobs, ranks):
        if token_id not in found:
            text = context.text_of(token_id) if context else None
            found[token_id] = Logprob(logprob=logprob, rank=rank, decoded_token=text)
    return found
