"""`POST /v1/sample`: what the model would put at marked places of a text.

A selector names a literal that stands in the prompt once or several times, such as a label. For each place the answer
has a choice: the likeliest tokens where the literal begins, given all that precedes it. One pass over the prompt
scores every place, nothing is generated.
"""

from __future__ import annotations

import time
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from serving.api import params
from serving.api.call_weight import check_texts
from serving.api.errors import invalid
from serving.api.gate import Access
from serving.api.generation import run_generation
from serving.api.json_slices import Items, sliced_response
from serving.api.logprob_shapes import LogprobsWriter
from serving.api.route import Route
from serving.api.sse import until_disconnect
from serving.api.state import ServerState
from serving.api.text_work import LARGE
from serving.api.types import SampleBody
from xllm.client.assemble import Completion
from xllm.request import SamplingParams, TokenLogprobs
from xllm.text.token_text import TextContext
from xllm.text.tokenizer import Tokenizer

SELECTOR_MATCH, EMPTY_LOGPROBS = "selector_match", "empty_logprobs"
# Tokens of a place, and places of a prompt. Chosen: upstream's default of tokens; a bound on the answer.
MAX_LOGPROBS, MAX_MATCHES = 5, 1024  # tokens of a place, and places of a prompt. Chosen: they bound the answer


def find_places(tokenizer: Tokenizer, prompt: str, literal: str, *,
                add_special_tokens: bool) -> tuple[list[int], list[int]]:
    """(token ids of the prompt, for each match the index of the token in which it begins). Matches do not overlap.

    Raises ApiError if there are none, or too many.
    """
    token_ids, spans = tokenizer.encode_with_spans(prompt, add_special_tokens=add_special_tokens)
    places, index, start = list[int](), 0, prompt.find(literal)
    while start >= 0:
        while spans[index][1] <= start:
            index += 1
        places.append(index)
        if len(places) > MAX_MATCHES:
            raise invalid(f"selector: more than {MAX_MATCHES} matches in the prompt", "selector")
        start = prompt.find(literal, start + len(literal))
    if not places:
        raise invalid(f"selector: the prompt does not hold {literal[:64]!r}", "selector")
    return token_ids, places


def choice_json(writer: LogprobsWriter, index: int, place: int, entry: TokenLogprobs | None) -> dict[str, Any]:
    """The first token of a prompt has nothing before it, and so no distribution."""
    if entry is None:
        return {"index": index, "text": "", "token_index": place, "logprobs": None, "finish_reason": EMPTY_LOGPROBS}
    top = sorted(zip(entry.top_ids, entry.top_logprobs), key=lambda pair: -pair[1])
    likeliest = TokenLogprobs(top[0][0], top[0][1], 1, entry.top_ids, entry.top_logprobs)
    return {"index": index, "text": writer.text(likeliest.token_id), "token_index": place,
            "logprobs": writer.chat([likeliest], len(top)), "finish_reason": SELECTOR_MATCH}


async def create_sample(state: ServerState, request: Request, body: SampleBody) -> Response:
    """`POST /v1/sample`: the likeliest tokens at each match of the selector in the prompt. Raises ApiError naming the
    field."""
    for name in ("pooling", "normalize", "truncate_prompt_tokens"):
        if getattr(body, name) is not None:
            raise invalid(f"{name} is for embeddings", name)
    if not 1 <= body.logprobs <= MAX_LOGPROBS:
        raise invalid(f"logprobs must be in 1 to {MAX_LOGPROBS}", "logprobs")
    if not body.selector.value:
        raise invalid("selector.value must not be empty", "selector")
    tokenizer = state.need_tokenizer("prompt")
    special = True if body.add_special_tokens is None else body.add_special_tokens
    check_texts(state, [body.prompt], "prompt")

    def find() -> tuple[list[int], list[int]]:
        if len(body.prompt) > LARGE:  # the places of a text that is too long are not looked for
            check_length(tokenizer.encode(body.prompt, add_special_tokens=special))
        found = find_places(tokenizer, body.prompt, body.selector.value, add_special_tokens=special)
        check_length(found[0])
        return found

    def check_length(ids: list[int]) -> None:
        params.choose_max_tokens(state, 1, len(ids), default=1, prompt_field="prompt")

    token_ids, places = await state.text_work.run(len(body.prompt), find)
    sampling = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, detokenize=False,
                              prompt_logprobs=body.logprobs)
    call = params.call_id(body, "sample", request.headers.get("x-request-id"))
    requests = params.plain_requests(state, body, call, [token_ids], sampling)
    generation = await until_disconnect(request.scope, request.receive, run_generation(state, requests, body.timeout_s))
    choice: Completion = generation.choices[0]
    # As delivered, the first entry is the prompt's first token's, which has none.
    choices = Items(choice_json(LogprobsWriter(TextContext(tokenizer, token_ids[:place], sampling), as_ids=False),
                                index, place, choice.prompt_logprobs[place])
                    for index, place in enumerate(places))
    return await sliced_response({"id": call, "object": "sample_completion", "created": int(time.time()),
                          "model": body.model or state.served_names[0], "choices": choices,
                          "usage": generation.usage(1, hidden_tokens=1)})


ROUTES = (Route("POST", "/v1/sample", Access.USER, SampleBody, create_sample),)
