"""The request bodies that have a table of members: who declares them, and where they go."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from anthropic.types.beta.message_count_tokens_params import MessageCountTokensParams as BetaCountParams
from anthropic.types.beta.message_create_params import MessageCreateParams as BetaMessageParams
from anthropic.types.message_count_tokens_params import MessageCountTokensParams as CountParams
from anthropic.types.message_create_params import MessageCreateParams as MessageParams
from openai.types.chat.completion_create_params import CompletionCreateParams as ChatParams
from openai.types.completion_create_params import CompletionCreateParams
from openai.types.embedding_create_params import EmbeddingCreateParams
from openai.types.responses.response_create_params import ResponseCreateParams
from pydantic import BaseModel

from serving.api.types import (
    ChatBody,
    CompletionBody,
    CountTokensBody,
    DetokenizeBody,
    EmbeddingBody,
    MessagesBody,
    RerankBody,
    ResponsesBody,
    SampleBody,
    ScoreBody,
    StrictBody,
    TokenizeBody,
)
from tests.members.effects import (
    CHAT,
    COMPLETIONS,
    COUNT_TOKENS,
    DETOKENIZE,
    EMBEDDINGS,
    MESSAGES,
    RERANK,
    RESPONSES,
    SAMPLE,
    SCORE,
    TOKENIZE,
    USER,
    Effect,
)
from tests.members.sdk import Path, members_of, paths
from tests.members.values import Json, Made


@dataclass(frozen=True)
class Body:
    """params: the types of the packages. own: ours. made: how to send its members. effects: see `effects.py`."""

    path: str
    params: tuple[Any, ...]
    own: type[StrictBody]
    made: Made
    effects: Mapping[str, Effect] = field(default_factory=dict)

    @cached_property
    def members(self) -> dict[str, Path]:
        """All that are declared."""
        return self.declared()

    def declared(self, stops: Collection[str] = ()) -> dict[str, Path]:
        """By its text, every path that the packages or our own types have."""
        found = {path.text: path for kind in self.params for path in paths(kind, stops)}
        unions = {path.owner for path in found.values() if path.text[len(path.owner):].startswith("(")}
        own = {path.text: path for path in _own_paths(self.own, "", stops) if path.owner not in unions}
        return {name: Path(name, str, "") for name in self.own.harmless} | own | found


def _own_paths(kind: type[BaseModel], owner: str, stops: Collection[str]) -> Iterator[Path]:
    """Every field, also of the models within, but those that take anything; nothing below one of `stops`."""
    for name, info in kind.model_fields.items():
        path = Path(f"{owner}.{name}" if owner else name, info.annotation, owner)
        yield path
        for part in members_of(info.annotation):
            if isinstance(part, type) and issubclass(part, StrictBody) and path.text not in stops:
                yield from _own_paths(part, path.text, stops)


CHATTED: Json = {"messages": [USER]}
SPOKEN: Json = {"messages[role=system]": {"content": "x"}}  # its type has other ways to say something
INSTEAD: Json = {"messages[role=system].clear_at": "next_user_message",
                 **{f"thinking(type={kind}).display": "omitted" for kind in ("enabled", "adaptive")}}
NAMED: Json = {"tools": [{"name": "x", "input_schema": {}}]}
SCORED: Json = {"text_1": "import os", "text_2": "import sys"}
RANKED: Json = {"query": "import os", "documents": ["import sys", "for x in y"]}
SAMPLED: Json = {"prompt": "a b a b", "selector": {"value": "b"}}
BODIES = {
    "POST /v1/chat/completions": Body("/v1/chat/completions", (ChatParams,), ChatBody, Made(
        {**CHATTED, "max_tokens": 1}, {"response_format(type=json_schema).json_schema": {"schema": {}}}), CHAT),
    "POST /v1/completions": Body("/v1/completions", (CompletionCreateParams,), CompletionBody, Made(
        {"prompt": "def f(", "max_tokens": 1}), COMPLETIONS),
    "POST /v1/embeddings": Body("/v1/embeddings", (EmbeddingCreateParams,), EmbeddingBody, Made({"input": "x"}),
                                EMBEDDINGS),
    "POST /v1/responses": Body("/v1/responses", (ResponseCreateParams,), ResponsesBody, Made(
        {"input": [USER], "max_output_tokens": 16, "store": False},
        beside={"stream_options": {"stream": True}},
        instead={"truncation": "auto", "stream_options.continuous_usage_stats": True}), RESPONSES),
    "POST /v1/messages": Body("/v1/messages", (MessageParams, BetaMessageParams), MessagesBody, Made(
        {**CHATTED, "max_tokens": 16}, SPOKEN, instead=INSTEAD), MESSAGES),
    "POST /v1/messages/count_tokens": Body("/v1/messages/count_tokens", (CountParams, BetaCountParams), CountTokensBody,
                                           Made(CHATTED, SPOKEN, {"tool_choice": NAMED}, INSTEAD), COUNT_TOKENS),
    "POST /v1/score": Body("/v1/score", (), ScoreBody, Made(SCORED), SCORE),
    "POST /v1/rerank": Body("/v1/rerank", (), RerankBody, Made(RANKED), RERANK),
    "POST /v1/sample": Body("/v1/sample", (), SampleBody, Made(SAMPLED), SAMPLE),
    "POST /tokenize": Body("/tokenize", (), TokenizeBody, Made({"prompt": "x"}), TOKENIZE),
    "POST /detokenize": Body("/detokenize", (), DetokenizeBody, Made({"tokens": [60]}), DETOKENIZE),
}
