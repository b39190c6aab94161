"""`POST /v1/embeddings` (vLLM: `/pooling`), `/score` and `/rerank`: texts as vectors, how near they are to each other.

A score is the cosine of two embeddings, which is what models made for embedding are trained for; whatever model is
served, it is what `/v1/embeddings` gives that is compared.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from fastapi import Request
from fastapi.responses import Response

from serving.api import params
from serving.api.call_weight import check_texts
from serving.api.errors import invalid, json_response
from serving.api.gate import Access
from serving.api.generation import run_generation
from serving.api.json_slices import Items, sliced_response
from serving.api.members import check_members
from serving.api.route import Route
from serving.api.routes.completions import check_adds_nothing, read_prompts
from serving.api.sse import until_disconnect
from serving.api.state import ServerState
from serving.api.types import EmbeddingBody, PoolingBody, RerankBody, ScoreBody
from xllm.pooling import PoolingParams
from xllm.request import SamplingParams

SAMPLING = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, detokenize=False)
VECTORS_AT_ONCE = 16  # that are made into JSON before the event loop has a turn. Chosen: each has thousands of numbers
TEXT_PARAM = "text_1 or text_2"


class Embedded:
    """Vectors of texts, fp32, in their order. num_tokens: of all texts."""

    def __init__(self, vectors: list[np.ndarray], num_tokens: int):
        self.vectors, self.num_tokens = vectors, num_tokens

    @property
    def num_values(self) -> int:
        """Numbers of all vectors."""
        return sum(map(len, self.vectors))

    @property
    def usage(self) -> dict[str, int]:
        return {"prompt_tokens": self.num_tokens, "total_tokens": self.num_tokens}


async def embed(state: ServerState, request: Request, body: PoolingBody, inputs: Sequence[str] | Sequence[list[int]],
                call: str, field: str, dimensions: int | None = None) -> Embedded:
    """The vectors of the inputs, in order. field: the inputs' name in the request. Raises ApiError naming the field."""
    pooling = PoolingParams(kind=body.pooling, dimensions=dimensions, normalize=body.normalize)
    token_ids = await _encode(state, body, inputs, field)
    for ids in token_ids:
        params.choose_max_tokens(state, 1, len(ids), default=1, prompt_field=field)
    size = max(sum(map(len, token_ids)), params.SEQUENCE_SIZE * len(token_ids))
    requests = await state.text_work.run(
        size, lambda: params.pooling_requests(state, body, call, token_ids, SAMPLING, pooling, field))
    generation = await until_disconnect(request.scope, request.receive, run_generation(state, requests, body.timeout_s))
    vectors = []
    for choice in generation.choices:
        vectors.append(np.array(choice.embedding, dtype=np.float32))
        choice.embedding = None  # one form of it is enough
        if len(vectors) % VECTORS_AT_ONCE == 0:
            await asyncio.sleep(0)
    return Embedded(vectors, sum(map(len, token_ids)))


async def _encode(state: ServerState, body: PoolingBody, inputs: Sequence[str] | Sequence[list[int]],
                  field: str) -> list[list[int]]:
    limit = state.config.limits.max_sequences_per_request
    if len(inputs) > limit:
        raise invalid(f"{field} holds {len(inputs)} texts, more than {limit}", field)
    if any(not item for item in inputs):
        raise invalid(f"{field} must not be empty", field)
    texts = [item for item in inputs if isinstance(item, str)]
    check_texts(state, texts, field)
    if not texts:
        check_adds_nothing(body.add_special_tokens, field)
        return [_cut(body, list(item), field, state) for item in inputs if not isinstance(item, str)]
    tokenizer = state.need_tokenizer(field)
    special = True if body.add_special_tokens is None else body.add_special_tokens

    def encode() -> list[list[int]]:
        return [_cut(body, tokenizer.encode(text, add_special_tokens=special), field, state) for text in texts]

    return await state.text_work.run(sum(map(len, texts)), encode)


def _cut(body: PoolingBody, token_ids: list[int], field: str, state: ServerState) -> list[int]:
    """The tokens that are embedded: the first `truncate_prompt_tokens`, if the request says it (-1: as many as the
    model takes)."""
    keep = body.truncate_prompt_tokens
    if keep is None:
        return token_ids
    if keep != -1 and not 1 <= keep < state.facts.max_model_len:
        raise invalid(f"truncate_prompt_tokens must be -1 or in 1 to {state.facts.max_model_len - 1}",
                      "truncate_prompt_tokens")
    return token_ids[:state.facts.max_model_len - 1 if keep == -1 else keep]


def encoded(vector: np.ndarray, form: Literal["float", "base64"]) -> Any:
    """A vector as OpenAI writes it: numbers, or the base64 of little-endian fp32."""
    if form == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return vector.tolist()


def cosine(a_D: np.ndarray, b_D: np.ndarray) -> float:
    """The cosine of the angle between two vectors; 0 if one of them is 0."""
    norms = float(np.linalg.norm(a_D)) * float(np.linalg.norm(b_D))
    return float(a_D @ b_D) / norms if norms else 0.0


def score_pairs(texts_1: list[str], texts_2: list[str]) -> list[tuple[int, int]]:
    """(index of text_1, index of text_2) of each score: one text against all, or each against its own. Raises
    ApiError."""
    if len(texts_1) == 1:
        return [(0, index) for index in range(len(texts_2))]
    if len(texts_1) != len(texts_2):
        raise invalid(f"text_1 holds {len(texts_1)} texts and text_2 {len(texts_2)}: give one and many, or as many",
                      "text_2")
    return [(index, index) for index in range(len(texts_1))]


def as_texts(value: str | list[str], field: str) -> list[str]:
    """The texts of a field that holds one or a list. Raises ApiError 400 naming `field` for an empty list."""
    texts = [value] if isinstance(value, str) else value
    if not texts:
        raise invalid(f"{field} must not be empty", field)
    return texts


def document_text(document: str | dict[str, Any], index: int) -> str:
    """The text of one document of a rerank request. Raises ApiError naming it if it has none."""
    text = document if isinstance(document, str) else document.get("text")
    if isinstance(document, dict):
        check_members(document, ("text",), f"documents.{index}")
    if not isinstance(text, str):
        raise invalid(f"documents[{index}] must be a text or {{'text': ...}}", "documents")
    return text


async def _pooled(state: ServerState, request: Request, body: EmbeddingBody, prefix: str, kind: str,
                  key: str) -> Response:
    """kind: what a vector calls itself; key: its member that holds the numbers."""
    call = params.call_id(body, prefix, request.headers.get("x-request-id"))
    inputs = read_prompts(body.input, state.config.limits.max_sequences_per_request, field="input")
    found = await embed(state, request, body, inputs, call, "input", body.dimensions)
    data = Items({"object": kind, "index": index, key: encoded(vector, body.encoding_format)}
                 for index, vector in enumerate(found.vectors))
    return await sliced_response({"id": call, "object": "list", "data": data,
                                  "model": body.model or state.served_names[0], "usage": found.usage})


async def create_embeddings(state: ServerState, request: Request, body: EmbeddingBody) -> Response:
    return await _pooled(state, request, body, "embd", "embedding", "embedding")


async def create_pooling(state: ServerState, request: Request, body: EmbeddingBody) -> Response:
    return await _pooled(state, request, body, "pool", "pooling", "data")


async def create_score(state: ServerState, request: Request, body: ScoreBody) -> Response:
    """`POST /score`: the cosine of each pair of texts."""
    call = params.call_id(body, "score", request.headers.get("x-request-id"))
    texts_1, texts_2 = as_texts(body.text_1, "text_1"), as_texts(body.text_2, "text_2")
    pairs = score_pairs(texts_1, texts_2)
    found = await embed(state, request, body, [*texts_1, *texts_2], call, TEXT_PARAM)
    firsts, seconds = found.vectors[:len(texts_1)], found.vectors[len(texts_1):]
    scores = await state.text_work.run(
        found.num_values, lambda: [cosine(firsts[i], seconds[j]) for i, j in pairs])
    data = [{"object": "score", "index": index, "score": score} for index, score in enumerate(scores)]
    return json_response({"id": call, "object": "list", "data": data,
                          "model": body.model or state.served_names[0], "usage": found.usage})


async def create_rerank(state: ServerState, request: Request, body: RerankBody) -> Response:
    """`POST /rerank`: the documents by their cosine with the query, the nearest first, `top_n` of them."""
    call = params.call_id(body, "rerank", request.headers.get("x-request-id"))
    texts = [document_text(document, index) for index, document in enumerate(body.documents)]
    if body.top_n is not None and body.top_n < 1:
        raise invalid("top_n must be at least 1", "top_n")
    found = await embed(state, request, body, [body.query, *texts], call, "documents")
    query, *vectors = found.vectors
    scores = await state.text_work.run(found.num_values, lambda: [cosine(query, vector) for vector in vectors])
    order = sorted(range(len(texts)), key=lambda index: -scores[index])[:body.top_n]
    results = [{"index": index, "relevance_score": scores[index],
                **({"document": {"text": texts[index]}} if body.return_documents else {})} for index in order]
    return json_response({"id": call, "model": body.model or state.served_names[0], "results": results,
                          "usage": found.usage})


ROUTES = (
    Route("POST", "/v1/embeddings", Access.USER, EmbeddingBody, create_embeddings),
    Route("POST", "/pooling", Access.USER, EmbeddingBody, create_pooling),
    *(Route("POST", path, Access.USER, ScoreBody, create_score) for path in ("/score", "/v1/score")),
    *(Route("POST", path, Access.USER, RerankBody, create_rerank) for path in ("/rerank", "/v1/rerank", "/v2/rerank")),
)
