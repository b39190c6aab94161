"""`POST /v1/completions`: prompts as text or token ids, one or many, with echo and legacy logprobs."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from serving.api import params
from serving.api.call_weight import check_texts
from serving.api.drive import drive
from serving.api.errors import as_api_error, invalid
from serving.api.gate import Access
from serving.api.generation import Generation
from serving.api.json_slices import Items, Sliced, Slices, sliced
from serving.api.logprob_shapes import ChoiceLogprobs, LogprobsWriter, TokenPlaces, finite_slices
from serving.api.route import Route
from serving.api.sse import EventForm
from serving.api.state import ServerState
from serving.api.structured import read_structured
from serving.api.types import CompletionBody
from serving.observe.request_log import RequestKind
from xllm.client.assemble import Completion, Piece
from xllm.request import SamplingParams, TokenLogprobs
from xllm.text.detokenizer import Detokenizer
from xllm.token_ids import are_integers

REPLACEMENT = "\ufffd"
VISIBLE = SamplingParams(skip_special_tokens=False, logprobs=0)  # how a prompt of token ids is echoed


@dataclass(frozen=True)
class CompletionPrompt:
    """echo: what of it is echoed, and where each of its tokens begins in that; where it is asked for."""

    token_ids: list[int]
    text: str | None  # None: it came as token ids
    echo: str = ""
    offsets: Sequence[int] = ()


@dataclass(frozen=True)
class _LogprobsPart:
    """Of an echoed prompt or an answer. names, tops: writers that stand at its beginning, each for one of the two."""

    token_ids: Sequence[int]
    entries: Sequence[TokenLogprobs | None]
    offsets: Sequence[int]
    num_before: int  # characters that are shown before it
    names: LogprobsWriter
    tops: LogprobsWriter

    def offset_slices(self) -> Iterator[list[int]]:
        """Zeros where there is no text."""
        if not self.offsets:
            return ([0] * len(some) for some in sliced(self.token_ids))
        return ([self.num_before + offset for offset in some] for some in sliced(self.offsets))


@dataclass
class CompletionCall:
    """One call: what was asked for."""

    state: ServerState
    body: CompletionBody
    id: str
    prompts: list[CompletionPrompt]
    n: int
    model: str

    @property
    def hides_output(self) -> bool:
        """Echo only: one token is made and not shown."""
        return self.body.max_tokens == 0


class CompletionWriter:
    """Writes a call's answers as a text completion, or as its chunks (`drive.Writer`)."""

    form = EventForm.PLAIN

    def __init__(self, call: CompletionCall, generation: Generation):
        self._call, self._generation, self._body = call, generation, call.body
        self._hides_output = call.hides_output
        self._logprobs = ChoiceLogprobs(call.state.tokenizer, as_ids=bool(call.body.return_tokens_as_token_ids))
        self._unfinished: dict[int, str] = {}  # by choice: the end of its echoed prompt, which its text may complete
        self._places: dict[int, TokenPlaces] = {}  # by choice
        self._head = {"id": call.id, "object": "text_completion", "created": int(time.time()), "model": call.model}

    def take(self, piece: Piece) -> None:
        """The choices hold all of it."""

    def body(self) -> Sliced:
        return Sliced(self._head, choices=Items(map(self._choice_json, self._generation.choices)), usage=self._usage())

    def begin(self) -> tuple[()]:
        """Nothing: each choice begins with its first piece."""
        return ()

    def piece(self, piece: Piece) -> list[dict[str, Any]]:
        """One chunk, or none: of tokens that do not make a character yet."""
        body, options = self._body, self._body.stream_options
        shown = self._piece_json(self._generation.choices[piece.index], piece)
        if not (piece.text or piece.is_first or piece.finish_reason or body.return_token_ids
                or (shown["logprobs"] or {}).get("tokens")):
            return []
        is_sliced = piece.is_first and (body.logprobs is not None or body.prompt_logprobs is not None)
        chunk = Sliced(self._head, choices=Items([shown])) if is_sliced else {**self._head, "choices": [shown]}
        if options and options.continuous_usage_stats:
            chunk["usage"] = self._usage()
        return [chunk]

    def end(self) -> list[dict[str, Any]]:
        """What all of it took, if that was asked for."""
        options = self._body.stream_options
        return [{**self._head, "choices": [], "usage": self._usage()}] if options and options.include_usage else []

    def error(self, error: Exception) -> dict[str, Any]:
        return as_api_error(error).body()

    def _prompt_of(self, choice: Completion) -> CompletionPrompt:
        return self._call.prompts[choice.index // self._call.n]

    def _usage(self) -> dict[str, object]:
        return self._generation.usage(self._call.n, hidden_tokens=int(self._hides_output))

    def _choice_json(self, choice: Completion) -> dict[str, Any]:
        """A finished choice, for `json_pieces`."""
        return self._piece_json(choice, Piece(
            choice.index, choice.text, choice.token_ids, choice.logprobs or None, choice.finish_reason,
            choice.stop_reason, is_first=True, offsets=choice.offsets))

    def _piece_json(self, choice: Completion, piece: Piece) -> dict[str, Any]:
        """One piece, with the echoed prompt before the first."""
        body, prompt = self._body, self._prompt_of(choice)
        text = self._echo(choice, piece) + ("" if self._hides_output else piece.text)
        shown = {"index": piece.index, "text": text, "logprobs": None,
                 "finish_reason": "length" if self._hides_output else piece.finish_reason,
                 "stop_reason": piece.stop_reason}
        if body.logprobs is not None:
            shown["logprobs"] = self._logprobs_json(choice, piece)
        if piece.is_first and body.prompt_logprobs is not None:
            shown["prompt_logprobs"] = Slices(
                self._logprobs.of_prompt(choice).prompt_slices(prompt.token_ids, choice.prompt_logprobs))
        if body.return_token_ids:
            shown["token_ids"] = [] if self._hides_output else piece.token_ids
            if piece.is_first:
                shown["prompt_token_ids"] = prompt.token_ids
        return shown

    def _echo(self, choice: Completion, piece: Piece) -> str:
        """What is echoed before a piece's text. A prompt that ends within a character is shown without it until it is
        known whether the answer completes it."""
        if not self._body.echo:
            return ""
        text = self._prompt_of(choice).echo if piece.is_first else ""
        if text.endswith(REPLACEMENT) and self._prompt_of(choice).text is None:
            whole = text.rstrip(REPLACEMENT)
            self._unfinished[choice.index], text = text[len(whole):], whole
        if piece.text or piece.finish_reason:
            unfinished = self._unfinished.pop(choice.index, "")
            text += unfinished[: len(unfinished) - self._num_replaced(choice)]
        return text

    def _num_replaced(self, choice: Completion) -> int:
        return 0 if self._hides_output else choice.num_replaced

    def _logprobs_json(self, choice: Completion, piece: Piece) -> dict[str, Any]:
        body, prompt, writer = self._body, self._prompt_of(choice), self._logprobs.of(choice)
        num_echoed = len(prompt.echo) - self._num_replaced(choice) if body.echo else 0
        places = self._places.setdefault(choice.index, TokenPlaces())
        token_ids, entries, offsets = ([], [], ()) if self._hides_output else places.take(piece, choice.offsets)
        if not piece.is_first:  # a few tokens of a stream
            return writer.completion(token_ids, entries, [num_echoed + offset for offset in offsets])
        parts: list[_LogprobsPart] = []
        if body.echo:
            at_start = functools.partial(self._logprobs.at_start,
                                         VISIBLE if prompt.text is None else choice.request.sampling)
            parts.append(_LogprobsPart(prompt.token_ids, choice.prompt_logprobs, prompt.offsets, 0, at_start(),
                                       at_start()))
        if not self._hides_output:
            parts.append(_LogprobsPart(token_ids, entries, offsets, num_echoed, self._logprobs.behind_prompt(choice),
                                       writer))
        return {
            "text_offset": Slices(slice for part in parts for slice in part.offset_slices()),
            "tokens": Slices(slice for part in parts for slice in part.names.name_slices(part.token_ids)),
            "token_logprobs": Slices(slice for part in parts for slice in finite_slices(part.entries)),
            "top_logprobs": Slices(slice for part in parts
                                   for slice in part.tops.top_slices(part.token_ids, part.entries)),
        }


def read_prompts(value: Any, limit: int, field: str = "prompt") -> list[str] | list[list[int]]:
    """Sort out the four shapes of a prompt. Raises ApiError naming the field."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise invalid(f"{field} must be a string, a list of strings, a list of token ids or a list of such lists",
                      field)
    if not value:
        raise invalid(f"{field} must not be empty", field)
    if type(value[0]) is int and are_integers(value):
        return [value]
    if len(value) > limit:
        raise invalid(f"{field} holds {len(value)} prompts, more than {limit}", field)
    if all(isinstance(item, str) for item in value):
        return value
    if all(isinstance(item, list) and are_integers(item) for item in value):
        return value
    raise invalid(f"{field} mixes strings, token ids and lists, or holds something else", field)


def adds_special_tokens(body: CompletionBody) -> bool:
    """Whether the tokenizer may add bos and the like to a prompt."""
    return True if body.add_special_tokens is None else body.add_special_tokens


def check_adds_nothing(add_special_tokens: bool | None, field: str) -> None:
    """A prompt of token ids is taken as it is. Raises ApiError where tokens shall be added to it."""
    if add_special_tokens:
        raise invalid(f"add_special_tokens is for text, and {field} holds token ids", "add_special_tokens")


async def encode_prompts(state: ServerState, body: CompletionBody) -> list[CompletionPrompt]:
    raw = read_prompts(body.prompt, state.config.limits.max_sequences_per_request)
    if any(not item for item in raw):
        raise invalid("prompt must not be empty", "prompt")
    if isinstance(raw[0], list):
        check_adds_nothing(body.add_special_tokens, "prompt")
    check_texts(state, (item for item in raw if isinstance(item, str)), "prompt")
    return await state.text_work.run(sum(map(len, raw)), lambda: [_encoded(state, body, item) for item in raw])


def _encoded(state: ServerState, body: CompletionBody, item: str | list[int]) -> CompletionPrompt:
    """With its echo: the prompt as it came; of token ids the text, with special tokens in it."""
    text, add_special, tokenizer = None, adds_special_tokens(body), state.tokenizer
    if isinstance(item, str):
        text, tokenizer = item, state.need_tokenizer("prompt")
        token_ids = tokenizer.encode(item, add_special_tokens=add_special)
    else:
        token_ids = item
    if not body.echo or tokenizer is None or len(token_ids) >= state.facts.max_model_len:
        return CompletionPrompt(token_ids, text, (text or "") if body.echo else "")
    state.inputs.check_ids(token_ids)
    echo, offsets = text if text is not None else tokenizer.decode(token_ids), list[int]()
    if body.logprobs is not None:
        if text is not None:
            offsets = tokenizer.offsets(text, add_special)
        else:
            reader = Detokenizer(tokenizer, VISIBLE)
            reader.feed(token_ids)
            offsets = reader.offsets or []
    return CompletionPrompt(token_ids, text, echo, offsets)


async def create_completion(state: ServerState, request: Request, body: CompletionBody) -> Response:
    prompts = await encode_prompts(state, body)
    n = params.check_fan_out(state, body, len(prompts))
    if body.best_of not in (None, n):
        raise invalid("best_of other than n is not supported", "best_of")
    if body.stream_options and not body.stream:
        raise invalid("stream_options needs stream", "stream_options")
    call = CompletionCall(state, body, params.call_id(body, "cmpl", request.headers.get("x-request-id")), prompts,
                          n, body.model or state.served_names[0])
    if call.hides_output and not body.echo:
        raise invalid("max_tokens must be at least 1 unless echo is set", "max_tokens")
    settings: dict[str, Any] = {"structured": read_structured(body)}
    if body.echo and body.logprobs is not None and body.prompt_logprobs is None:
        settings["prompt_logprobs"] = body.logprobs
    requests = await params.engine_requests(
        state, body, call.id, [prompt.token_ids for prompt in prompts], n=n,
        max_tokens=body.max_tokens or (1 if call.hides_output else None),
        default=state.sampling_defaults.get("max_tokens", params.COMPLETION_MAX_TOKENS), logprobs=body.logprobs,
        num_echoed=sum(len(prompt.echo) for prompt in prompts), **settings)
    state.metrics[0].request_params_n.observe(n)  # of the call, whichever engine gets it
    return await drive(state, request, requests, functools.partial(CompletionWriter, call), timeout_s=body.timeout_s,
                       stream=body.stream)


ROUTES = (Route("POST", "/v1/completions", Access.USER, CompletionBody, create_completion,
                kind=RequestKind("completion", "text_completion")),)
