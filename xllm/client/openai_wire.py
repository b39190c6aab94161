"""What an OpenAI server and an `OpenAIServer` say to each other: the body of `POST /v1/completions` with vLLM's fields
(0.10.2 and later), and the chunks of its answer. Token ids both ways; texts are not looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from xllm.errors import EngineDeadError, RequestError
from xllm.request import FinishReason, OutputDelta, Request, SamplingParams, TokenLogprobs
from xllm.structured.spec import KINDS

# Named in the order of vLLM's documentation; sent whatever their values are, because the server's own defaults, those
# of the model's generation_config.json, stand in for what is missing. The rest is sent where it asks for something.
ALWAYS_SENT = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
_SEEDS = 2**64  # different ones that there are; vLLM takes them as signed numbers
_TOKEN = "token_id:"  # how tokens are called where no text of theirs is asked for (`return_tokens_as_token_ids`)
_ENDS = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH}
DONE = b"[DONE]"


def refusal(request: Request) -> RequestError | None:
    """Why the API has no way to say what this request asks for, by the name of its field; None: it has."""
    sampling, structured = request.sampling, request.sampling.structured
    asked = (
        (request.pooling is not None, "input", "embeddings"),
        (bool(request.lora), "model", "adapters"),
        (request.offline, "offline", "offline requests"),
        (request.deadline_s is not None, "ttlt_slo_ms", "wishes for the last token"),
        (sampling.prompt_logprobs is not None, "prompt_logprobs", "log-probabilities of a prompt that is streamed"),
        (structured is not None and structured.after is not None, "structured_outputs", "a form behind free reasoning"),
        *((True, name, f"{name} behind tokens that another instance has drawn") for name in _bound_to_start(request)),
    )
    for is_asked, field, what in asked:
        if is_asked:
            return RequestError(f"{field}: OpenAI servers (--openai-server) do not take {what}", field=field)
    return None


def _bound_to_start(request: Request) -> list[str]:
    """Parameters that look back to where the answer began, which the API cannot say of tokens that were drawn before:
    to the server they are the prompt."""
    if not request.generated_token_ids:
        return []
    sampling = request.sampling
    given = {"presence_penalty": sampling.presence_penalty, "frequency_penalty": sampling.frequency_penalty,
             "bad_words": sampling.bad_words_token_ids, "structured_outputs": sampling.structured}
    return [name for name, value in given.items() if value]


def completion_body(request: Request, model: str, max_model_len: int) -> dict[str, Any]:
    """The body for one sequence, which `refusal` does not refuse. max_model_len: of the server, in tokens."""
    sampling, drawn = request.sampling, request.generated_token_ids
    prompt = [*request.prompt_token_ids, *drawn]
    longest = max_model_len - len(prompt)
    body: dict[str, Any] = {
        "model": model, "prompt": prompt, "stream": True, "stream_options": {"include_usage": True},
        "return_token_ids": True, "return_tokens_as_token_ids": True,
        "max_tokens": longest if sampling.max_tokens is None else min(longest, sampling.max_tokens - len(drawn)),
        **{name: getattr(sampling, name) for name in ALWAYS_SENT}, **_wishes(sampling, len(drawn))}
    # vLLM ends a text at the ids of its own folder's files; these are those of the master's.
    stops = sampling.stop_token_ids if sampling.ignore_eos else (*sampling.stop_token_ids, *request.eos_token_ids)
    if stops:
        body["stop_token_ids"] = list(dict.fromkeys(stops))
    if request.priority:
        body["priority"] = request.priority
    if request.cache_salt:
        body["cache_salt"] = request.cache_salt
    return body


def _wishes(sampling: SamplingParams, num_drawn: int) -> dict[str, Any]:
    """Of the fields that are left out where they ask for nothing, the others."""
    found: dict[str, Any] = {"ignore_eos": True} if sampling.ignore_eos else {}
    if sampling.seed is not None:  # not the numbers again that the first tokens were drawn by
        found["seed"] = (sampling.seed + num_drawn + _SEEDS // 2) % _SEEDS - _SEEDS // 2
    if sampling.min_tokens > num_drawn:
        found["min_tokens"] = sampling.min_tokens - num_drawn
    if sampling.logprobs is not None:
        found["logprobs"] = sampling.logprobs
    if sampling.logit_bias:
        found["logit_bias"] = {str(token_id): bias for token_id, bias in sampling.logit_bias.items()}
    if sampling.allowed_token_ids is not None:
        found["allowed_token_ids"] = list(sampling.allowed_token_ids)
    if sampling.bad_words:
        found["bad_words"] = list(sampling.bad_words)
    if sampling.structured is not None:
        found["structured_outputs"] = {name: value for name in KINDS
                                       if (value := getattr(sampling.structured, name)) is not None}
    return found


class ChunkReader:
    """Reads the events of one answer, in their order. vocab_size: of the model that the master knows.

    The end of an answer is told with the event behind it, which says how much of the prompt was cached.
    """

    def __init__(self, request: Request, vocab_size: int):
        self._request, self._vocab_size = request, vocab_size
        self._num_logprobs = request.sampling.logprobs
        self._token_ids: list[int] = []  # that have come and were not passed on
        self._logprobs: list[TokenLogprobs] = []
        self._end: dict[str, Any] | None = None  # the choice that was the last
        self.is_done = False  # the terminal delta was given

    def read(self, data: bytes) -> OutputDelta | None:
        """What an event adds; None: nothing yet. data: of its line, without `data:`.

        Raises: RequestError: the server refuses the request now. EngineDeadError: it failed, or cannot be understood.
        """
        if self.is_done:
            return None
        if data == DONE:
            return self._ended({})
        try:
            event = msgspec.json.decode(data)
            if (error := event.get("error")) is not None:
                raise error_of(error)
            if choices := event["choices"]:
                return self._take(choices[0])
            return self._ended(event.get("usage") or {})
        except (msgspec.DecodeError, AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
            if isinstance(error, RequestError):
                raise
            raise EngineDeadError(f"what it sends cannot be read: {type(error).__name__}: {error}"[:200]) from None

    def _take(self, choice: dict[str, Any]) -> OutputDelta | None:
        token_ids = choice.get("token_ids")
        if token_ids is None:
            raise EngineDeadError("it sends no token ids: return_token_ids needs vLLM 0.10.2 or later")
        for token_id in token_ids:
            if type(token_id) is not int or not 0 <= token_id < self._vocab_size:
                raise EngineDeadError(f"it sends token {token_id!r}, and the vocabulary of the master's tokenizer has "
                                      f"{self._vocab_size}")
        self._token_ids += token_ids
        if self._num_logprobs is not None and choice.get("logprobs") is not None:
            self._logprobs += self._read_logprobs(choice["logprobs"])
        if choice.get("finish_reason") is not None:
            self._end = choice
            return None
        return self._passed_on() if self._token_ids else None

    def _passed_on(self) -> OutputDelta | None:
        """What has come, as far as its log-probabilities have."""
        number = len(self._token_ids)
        if self._num_logprobs is not None:
            number = min(number, len(self._logprobs))
        if not number and self._end is None:
            return None
        token_ids, self._token_ids = self._token_ids[:number], self._token_ids[number:]
        logprobs, self._logprobs = self._logprobs[:number], self._logprobs[number:]
        return OutputDelta(self._request.request_id, token_ids, logprobs=logprobs or None)

    def _ended(self, usage: dict[str, Any]) -> OutputDelta:
        if self._end is None:
            raise EngineDeadError("the answer ended before its end")
        reason, stop = self._end["finish_reason"], self._end.get("stop_reason")
        if reason not in _ENDS and reason != "error":
            raise EngineDeadError(f"it ended the answer: {reason}")
        delta = self._passed_on()
        assert delta is not None, "there is an end"
        if self._token_ids:
            raise EngineDeadError("it has sent fewer log-probabilities than tokens")
        delta.finish_reason = _ENDS.get(reason, FinishReason.ERROR)
        if reason == "error":
            delta.error = "the server ended the answer with an error"
        is_own = isinstance(stop, int) and stop in self._request.sampling.stop_token_ids
        delta.stop_reason = stop if is_own else None  # else it is the end of a text
        delta.num_cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        self.is_done = True
        return delta

    def _read_logprobs(self, found: dict[str, Any]) -> list[TokenLogprobs]:
        assert self._num_logprobs is not None
        tops = found.get("top_logprobs") or [None] * len(found["tokens"])
        return [_entry(_id_of(name), logprob, top or {}, self._num_logprobs)
                for name, logprob, top in zip(found["tokens"], found["token_logprobs"], tops, strict=True)]


def _entry(token_id: int, logprob: float, top: dict[str, float], num_top: int) -> TokenLogprobs:
    """Of one position. top: the likeliest tokens by their names, and the chosen one. The chosen one's rank is not told:
    where it is not among those that were asked for, it is said to be the next one."""
    ranked = sorted(((_id_of(name), value) for name, value in top.items()), key=lambda one: -one[1])[:num_top]
    ids = tuple(one for one, _ in ranked)
    rank = ids.index(token_id) + 1 if token_id in ids else len(ids) + 1
    return TokenLogprobs(token_id, logprob, rank, ids, tuple(value for _, value in ranked))


def _id_of(name: str) -> int:
    if not name.startswith(_TOKEN):
        raise ValueError("a token is called by its text, not by its id")
    return int(name.removeprefix(_TOKEN))


def error_of(error: Any, status: int = 500) -> Exception:
    """What an error in the form of the API means. status: of the HTTP answer that it came with; one that it names
    itself goes before that."""
    said = error if isinstance(error, dict) else {"message": str(error)}
    message = str(said.get("message") or "an error without a message")[:1000]
    code = said.get("code")
    status = code if isinstance(code, int) and 400 <= code < 600 else status
    if status in (400, 413, 422):
        param = said.get("param")
        return RequestError(message, field=param if isinstance(param, str) and param else "prompt")
    return EngineDeadError(f"HTTP {status}: {message}")


def data_lines(take: Callable[[bytes], None], rest: bytes, piece: bytes) -> bytes:
    """Call `take` with the data of each line of an event stream that a piece completes; returns what is left of it.
    Lines end at a line feed alone: texts may hold what Unicode calls the end of a line."""
    *lines, rest = (rest + piece).split(b"\n")
    for line in lines:
        if line.startswith(b"data:"):
            take(line[5:].strip())
    return rest


def first_refusal(requests: Sequence[Request]) -> RequestError | None:
    """Of the requests of one call."""
    return next((found for request in requests if (found := refusal(request)) is not None), None)
