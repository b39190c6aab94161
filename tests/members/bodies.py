"""The request bodies that have a table of members: who declares them, and where they go."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from openai.types.chat.completion_create_params import CompletionCreateParams as ChatParams
from openai.types.completion_create_params import CompletionCreateParams
from openai.types.embedding_create_params import EmbeddingCreateParams
from pydantic import BaseModel

from serving.api.types import ChatBody, CompletionBody, EmbeddingBody, StrictBody
from tests.members.effects import CHAT, COMPLETIONS, EMBEDDINGS, USER, Effect
from tests.members.sdk import Path, members_of, paths


@dataclass(frozen=True)
class Body:
    """params: the types of the packages. own: ours. base: a body that is answered. effects: see `effects.py`.
    company: see `values.py`."""

    path: str
    params: tuple[Any, ...]
    own: type[StrictBody]
    base: dict[str, Any]
    effects: Mapping[str, Effect] = field(default_factory=dict)
    company: Mapping[str, dict[str, Any]] = field(default_factory=dict)

    def declared(self, stops: Collection[str] = ()) -> dict[str, Path]:
        """By its text, every path that the packages or our own types have."""
        found = {path.text: path for kind in self.params for path in paths(kind, stops)}
        unions = {path.owner for path in found.values() if path.text[len(path.owner):].startswith("(")}
        return {path.text: path for path in _own_paths(self.own, "") if path.owner not in unions} | found


def _own_paths(kind: type[BaseModel], owner: str) -> Iterator[Path]:
    """Every field, also of the models within, but those that take anything."""
    for name, info in kind.model_fields.items():
        path = Path(f"{owner}.{name}" if owner else name, info.annotation, owner)
        yield path
        for part in members_of(info.annotation):
            if isinstance(part, type) and issubclass(part, StrictBody):
                yield from _own_paths(part, path.text)


BODIES = {
    "POST /v1/chat/completions": Body("/v1/chat/completions", (ChatParams,), ChatBody,
                                      {"messages": [USER], "max_tokens": 1}, CHAT,
                                      {"response_format(type=json_schema).json_schema": {"schema": {}}}),
    "POST /v1/completions": Body("/v1/completions", (CompletionCreateParams,), CompletionBody,
                                 {"prompt": "def f(", "max_tokens": 1}, COMPLETIONS),
    "POST /v1/embeddings": Body("/v1/embeddings", (EmbeddingCreateParams,), EmbeddingBody, {"input": "x"}, EMBEDDINGS),
}
