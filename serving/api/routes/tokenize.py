"""`POST /tokenize` and `/detokenize`, `GET /tokenizer_info`: the server's tokenizer, for clients that count tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from serving.api.call_weight import check_texts
from serving.api.chat_prompt import chat_prompt
from serving.api.errors import ApiError, invalid, json_response
from serving.api.gate import Access
from serving.api.json_slices import Slices, sliced, sliced_response
from serving.api.route import Needs, Route
from serving.api.state import ServerState
from serving.api.tools import read_tools
from serving.api.types import DetokenizeBody, TokenizeBody
from xllm.request import SamplingParams
from xllm.text.token_text import TextContext
from xllm.text.tokenizer import NAMED_SPECIAL_TOKENS, Tokenizer

CHAT_ONLY = ("add_generation_prompt", "continue_final_message", "chat_template", "chat_template_kwargs", "tools")


async def tokenize(state: ServerState, request: Request, body: TokenizeBody) -> Response:
    if "messages" in body.model_fields_set and "add_special_tokens" not in body.model_fields_set:
        body.add_special_tokens = False  # a chat template writes them itself
    token_ids = await _token_ids(state, body)
    answer: dict[str, Any] = {"count": len(token_ids), "max_model_len": state.facts.max_model_len,
                              "tokens": Slices(sliced(token_ids)), "token_strs": None}
    if body.return_token_strs:
        tokenizer = state.need_tokenizer("return_token_strs")
        answer["token_strs"] = Slices(text_slices(tokenizer, token_ids))
    return await sliced_response(answer)


async def detokenize(state: ServerState, request: Request, body: DetokenizeBody) -> Response:
    vocab_size, tokenizer = state.facts.vocab_size, state.need_tokenizer("tokens")

    def decode() -> str:
        if body.tokens and not (min(body.tokens) >= 0 and max(body.tokens) < vocab_size):
            raise invalid(f"tokens must be in 0 to {vocab_size - 1}", "tokens")
        return tokenizer.decode(body.tokens)

    text = await state.text_work.run(len(body.tokens), decode)
    return json_response({"prompt": text})


async def tokenizer_info(state: ServerState, request: Request) -> Response:
    if state.tokenizer is None:
        raise ApiError(404, "this server runs without a tokenizer")
    return json_response(info_json(state.tokenizer, state.facts.max_model_len))


def token_texts(tokenizer: Tokenizer, token_ids: Sequence[int]) -> list[str]:
    """What each token adds to the text that `/detokenize` gives; part of a character shows as U+FFFD."""
    return [text for texts in text_slices(tokenizer, token_ids) for text in texts]


def text_slices(tokenizer: Tokenizer, token_ids: Sequence[int]) -> Iterator[list[str]]:
    """`token_texts` in slices, each of which is made when its turn comes."""
    context = TextContext(tokenizer, (), SamplingParams(skip_special_tokens=False))
    for some in sliced(token_ids):
        texts = []
        for token_id in some:
            texts.append(context.text_of(token_id))
            context.move_past(token_id)
        yield texts


def info_json(tokenizer: Tokenizer, max_model_len: int) -> dict[str, Any]:
    """As vLLM has it, under transformers' names: what token ids mean. The chat template, which may hold an operator's
    own words, and files of this machine are left out."""
    framed = tokenizer.encode("")  # what the tokenizer adds to every text
    named = {name: text for name, text in tokenizer.special_tokens.items() if name in NAMED_SPECIAL_TOKENS}
    ids = {name: tokenizer.backend.token_to_id(text) for name, text in named.items()}
    added = {str(token_id): {"content": token.content, "lstrip": token.lstrip, "normalized": token.normalized,
                             "rstrip": token.rstrip, "single_word": token.single_word, "special": token.special}
             for token_id, token in tokenizer.backend.get_added_tokens_decoder().items()}
    return {"tokenizer_class": "PreTrainedTokenizerFast",  # transformers' for a tokenizer.json
            "model_max_length": max_model_len, "vocab_size": tokenizer.vocab_size,
            "add_bos_token": ids.get("bos_token") in framed, "add_eos_token": ids.get("eos_token") in framed,
            **named, "added_tokens_decoder": added}


async def _token_ids(state: ServerState, body: TokenizeBody) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise invalid("give either prompt or messages", "prompt")
    if body.messages is not None:
        return (await chat_prompt(state, body, body.messages, read_tools(body.tools, None, None)))[0]
    assert body.prompt is not None
    for name in CHAT_ONLY:
        if getattr(body, name) not in (None, TokenizeBody.model_fields[name].default):
            raise invalid(f"{name} is for messages, and there is a prompt", name)
    tokenizer = state.need_tokenizer("prompt")
    check_texts(state, [body.prompt], "prompt")
    text, add_special = body.prompt, body.add_special_tokens
    return await state.text_work.run(len(text), lambda: tokenizer.encode(text, add_special))


ROUTES = (
    Route("POST", "/tokenize", Access.USER, TokenizeBody, tokenize, Needs.MODEL),
    Route("POST", "/detokenize", Access.USER, DetokenizeBody, detokenize, Needs.MODEL),
    Route("GET", "/tokenizer_info", Access.USER, None, tokenizer_info, Needs.MODEL, by_query=True),
)
