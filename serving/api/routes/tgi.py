"""`POST /generate` and `/generate_stream`, `GET /info`: the forms of Hugging Face's text-generation-inference (TGI)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from serving.api import params
from serving.api.body import check_fields
from serving.api.call_weight import check_texts
from serving.api.drive import drive
from serving.api.errors import ApiError, as_api_error, invalid, json_response, renaming
from serving.api.gate import Access
from serving.api.generation import Generation
from serving.api.json_slices import SLICE_VALUES, Items, Sliced, Slices
from serving.api.logprob_shapes import LOWEST
from serving.api.route import Needs, Route
from serving.api.routes.health import package_version
from serving.api.sse import EventForm
from serving.api.state import ServerState
from serving.api.structured import read_structured
from serving.api.text_work import THREADS
from serving.api.tgi_input import MAX_NEW_TOKENS, NAMES, TGIBody, check, completion_body
from serving.observe.request_log import RequestKind
from xllm.client.assemble import Completion, Piece
from xllm.client.engine_client import EngineBusyError
from xllm.request import MAX_CHOICES, SamplingParams, TokenLogprobs
from xllm.text.token_text import TextContext
from xllm.text.tokenizer import Tokenizer

VISIBLE = SamplingParams(skip_special_tokens=False)  # how the tokens of a prompt are shown
ShownToken = dict[str, Any]
# What TGI calls a failure, by our status: its own status, and its word. Any other is FAILED.
ERRORS = {**dict.fromkeys((400, 404), (422, "validation")), 413: (413, "validation"), 415: (415, "validation"),
          429: (429, "overloaded"), 503: (503, "healthcheck"), 504: (504, "incomplete_generation")}
FAILED = (424, "generation")


@dataclass(frozen=True)
class GenerateCall:
    """One call: what was asked for. seed: of its only choice, if that is drawn."""

    tokenizer: Tokenizer
    body: TGIBody
    seed: int | None

    @property
    def num_top(self) -> int:
        return self.body.wish.top_n_tokens or 0


class TokenReader:
    """Gives the tokens of one choice, each with the likeliest at its place, once their texts are known: all texts
    together are the choice's text.

    What stop strings hold back is known when the next token is there, so with such strings tokens come one later.
    """

    def __init__(self, call: GenerateCall, choice: Completion):
        self._tokenizer, self._choice, self._num_top = call.tokenizer, choice, call.num_top
        self._context = TextContext(call.tokenizer, choice.request.prompt_token_ids, choice.request.sampling)
        self._waits = bool(choice.request.sampling.stop)
        self._waiting = list[tuple[int, TokenLogprobs]]()
        self._text = ""  # of the waiting tokens, and of the one that is read
        self._num_chars = self._num_read = 0  # characters before that text, and tokens that have been given

    def read(self, piece: Piece) -> Iterator[tuple[ShownToken, list[ShownToken]]]:
        """Those that a piece completes; to be read to the end."""
        self._text += piece.text
        self._waiting += zip(piece.token_ids, piece.logprobs or ())
        start, num_given = 0, 0
        for token_id, entry in self._waiting:
            end = self._end_of_next(is_last=piece.finish_reason is not None)
            if end is None:
                break
            text, start = self._text[start:end], max(start, end)
            num_given, self._num_read = num_given + 1, self._num_read + 1
            yield self._shown(token_id, entry.logprob, text), self._tops(entry)
            self._context.move_past(token_id)
        self._text, self._num_chars = self._text[start:], self._num_chars + start
        del self._waiting[:num_given]

    def _end_of_next(self, *, is_last: bool) -> int | None:
        """Where in the text the next token ends; None: that is not known yet."""
        offsets, num_known = self._choice.offsets, len(self._text)
        if self._num_read + 1 < len(offsets):
            end = offsets[self._num_read + 1] - self._num_chars
            return min(end, num_known) if end <= num_known or is_last else None
        return num_known if is_last or not self._waits else None

    def _tops(self, entry: TokenLogprobs) -> list[ShownToken]:
        return [self._shown(token_id, logprob, self._context.text_of(token_id))
                for token_id, logprob in itertools.islice(zip(entry.top_ids, entry.top_logprobs), self._num_top)]

    def _shown(self, token_id: int, logprob: float, text: str) -> ShownToken:
        """A special token's name stands for its text, which the answer's does not show."""
        is_special = token_id in self._tokenizer.special_token_ids
        return {"id": token_id, "text": self._tokenizer.token_text(token_id) if is_special else text,
                "logprob": max(logprob, LOWEST), "special": is_special}


class GenerateWriter:
    """Writes a call's answer as TGI does (`drive.Writer`)."""

    form = EventForm.BARE

    def __init__(self, call: GenerateCall, generation: Generation):
        self._call, self._wish, self._choices = call, call.body.wish, generation.choices
        self._reader = TokenReader(call, self._choices[0])
        self._num_events = 0

    def take(self, piece: Piece) -> None:
        """The choices hold all of it."""

    def body(self) -> Sliced:
        best = max(self._choices, key=_mean_logprob) if len(self._choices) > 1 else self._choices[0]
        answer = Sliced(generated_text=self._text_of(best))
        if self._wish.details or self._wish.decoder_input_details:
            answer["details"] = self._details(best)
            if len(self._choices) > 1:
                answer["details"]["best_of_sequences"] = Items(
                    {"generated_text": self._text_of(choice), **self._details(choice)}
                    for choice in self._choices if choice is not best)
        return answer

    def begin(self) -> tuple[()]:
        """Nothing: the first event is the first token."""
        return ()

    def piece(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """An event for each token. The last one holds the whole text."""
        events = [self._event(*read) for read in self._reader.read(piece)]
        if piece.finish_reason is not None:
            if not events:  # it ended without another token, so there is none to tell of
                events.append(self._event({"id": self._choices[0].token_ids[-1], "text": "", "logprob": 0.0,
                                           "special": True}, []))
            events[-1].update(generated_text=self._text_of(self._choices[0]), details=self._ending())
        return iter(events)

    def end(self) -> tuple[()]:
        return ()

    def error(self, error: Exception) -> dict[str, Any]:
        shown, _, word = explained(error)
        return {"error": shown.message, "error_type": word}

    def _event(self, token: ShownToken, tops: list[ShownToken]) -> dict[str, Any]:
        self._num_events += 1
        event = {"index": self._num_events, "token": token, "generated_text": None, "details": None}
        return {**event, "top_tokens": tops} if self._call.num_top else event

    def _ending(self) -> dict[str, Any] | None:
        if not self._wish.details:
            return None
        choice = self._choices[0]
        return {**_end_of(choice), "seed": self._call.seed, "input_length": len(choice.request.prompt_token_ids)}

    def _text_of(self, choice: Completion) -> str:
        return (self._call.body.inputs if self._wish.return_full_text else "") + choice.text

    def _details(self, choice: Completion) -> dict[str, Any]:
        details = {**_end_of(choice), "seed": self._call.seed, "prefill": self._prefill(choice),
                   "tokens": Slices(_batches(token for token, _ in self._tokens(choice)))}
        if self._call.num_top:
            details["top_tokens"] = Slices(_batches(tops for _, tops in self._tokens(choice)))
        return details

    def _tokens(self, choice: Completion) -> Iterator[tuple[ShownToken, list[ShownToken]]]:
        """All of a choice that has ended."""
        return TokenReader(self._call, choice).read(Piece(
            choice.index, choice.text, choice.token_ids, choice.logprobs, choice.finish_reason))

    def _prefill(self, choice: Completion) -> Slices:
        """The prompt's tokens, where they are asked for. The first has no log-probability."""
        shown = self._prompt_tokens(choice) if self._wish.decoder_input_details else iter(())
        return Slices(_batches(shown))

    def _prompt_tokens(self, choice: Completion) -> Iterator[dict[str, Any]]:
        context = TextContext(self._call.tokenizer, (), VISIBLE)
        for token_id, entry in zip(choice.request.prompt_token_ids, choice.prompt_logprobs):
            token_id = int(token_id)
            yield {"id": token_id, "text": context.text_of(token_id),
                   "logprob": None if entry is None else max(entry.logprob, LOWEST)}
            context.move_past(token_id)


def _end_of(choice: Completion) -> dict[str, Any]:
    """Why it ended, and after how many tokens."""
    if choice.finish_reason == "length":
        reason = "length"
    else:
        reason = "stop_sequence" if isinstance(choice.stop_reason, str) else "eos_token"
    return {"finish_reason": reason, "generated_tokens": len(choice.token_ids)}


def _mean_logprob(choice: Completion) -> float:
    return sum(entry.logprob for entry in choice.logprobs) / max(1, len(choice.logprobs))


def _batches(values: Iterator[Any]) -> Iterator[list[Any]]:
    while batch := list(itertools.islice(values, SLICE_VALUES)):
        yield batch


async def generate(state: ServerState, request: Request, body: TGIBody) -> Response:
    return await _answer(state, request, body, streams=bool(body.stream))


async def generate_stream(state: ServerState, request: Request, body: TGIBody) -> Response:
    if body.stream is False:
        raise invalid("stream is false, and /generate_stream streams; ask /generate", "stream")
    return await _answer(state, request, body, streams=True)


async def _answer(state: ServerState, request: Request, body: TGIBody, *, streams: bool) -> Response:
    check(body, streams=streams)
    tokenizer, wish = state.need_tokenizer("inputs"), body.wish
    with renaming(NAMES, ()):
        check_fields({"stop": wish.stop, "logprobs": wish.top_n_tokens}, state.config.limits)
        check_texts(state, [body.inputs], "inputs")
        completion = completion_body(body)
        n = params.check_fan_out(state, completion, 1)
        token_ids = await state.text_work.run(len(body.inputs), lambda: tokenizer.encode(body.inputs, field="inputs"))
        needs_logprobs = streams or wish.details or wish.decoder_input_details or n > 1 or wish.top_n_tokens is not None
        requests = await params.engine_requests(
            state, completion, params.call_id(completion, "gen", request.headers.get("x-request-id")),
            [token_ids[-(wish.truncate or 0):]], n=n, max_tokens=wish.max_new_tokens, default=MAX_NEW_TOKENS,
            logprobs=(wish.top_n_tokens or 0) if needs_logprobs else None, prompt_field="inputs",
            max_tokens_field="max_new_tokens", logprobs_field="top_n_tokens" if wish.top_n_tokens else "details",
            num_echoed=len(body.inputs) if wish.return_full_text else 0, structured=read_structured(completion),
            prompt_logprobs=0 if wish.decoder_input_details else None)
        state.metrics[0].request_params_n.observe(n)  # of the call, whichever engine gets it
        call = GenerateCall(tokenizer, body, completion.seed if wish.samples else None)
        return await drive(state, request, requests, partial(GenerateWriter, call), timeout_s=None, stream=streams)


async def info(state: ServerState, request: Request) -> Response:
    facts, limits = state.facts, state.config.limits
    return json_response({
        "model_id": state.served_names[0], "model_sha": None, "model_pipeline_tag": "text-generation",
        "max_concurrent_requests": state.config.connections.max_connections, "max_best_of": MAX_CHOICES,
        "max_stop_sequences": limits.max_stop_strings, "max_input_tokens": facts.max_model_len - 1,
        "max_total_tokens": facts.max_model_len, "validation_workers": THREADS, "max_client_batch_size": 1,
        "router": "xllm", "version": package_version(), "sha": None, "docker_label": None})


def explained(error: Exception) -> tuple[ApiError, int, str]:
    """A failure as the API has it, and the status and the word that TGI's clients know."""
    shown = as_api_error(error)
    status, word = (429, "overloaded") if isinstance(error, EngineBusyError) else ERRORS.get(shown.status, FAILED)
    return shown, status, word


def failed(error: Exception) -> Response:
    """The one shape of errors that these clients know."""
    shown, status, word = explained(error)
    return json_response({"error": shown.message, "error_type": word}, status, shown.headers)


ROUTES = (
    Route("POST", "/generate", Access.USER, TGIBody, generate, kind=RequestKind("generate", "text_completion"),
          show_error=failed),
    Route("POST", "/generate_stream", Access.USER, TGIBody, generate_stream,
          kind=RequestKind("generate", "text_completion"), show_error=failed),
    Route("GET", "/info", Access.USER, None, info, Needs.MODEL, by_query=True, show_error=failed),
)
