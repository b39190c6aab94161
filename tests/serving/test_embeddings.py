"""Embeddings, scores and reranking over HTTP, with the real client."""

from __future__ import annotations

import base64
import threading

import numpy as np
import openai
import pytest

from tests.serving.server_process import ServerProcess
from xllm import LLM, PoolingParams

TEXTS = ["def add(a, b):\n    return a + b\n", "import os\nimport sys\n", "x"]


@pytest.fixture(scope="module")
def truth() -> dict[str, list[list[float]]]:
    with LLM(max_model_len=128, num_threads=1) as llm:
        return {kind: [output.embedding for output in llm.embed(TEXTS, PoolingParams(kind=kind))]
                for kind in ("last", "mean")}


def test_a_batch_through_the_openai_client(client: openai.OpenAI, truth: dict) -> None:
    answer = client.embeddings.create(model="", input=TEXTS, extra_body={"model": None})  # it asks for base64
    np.testing.assert_allclose([item.embedding for item in answer.data], truth["last"], atol=1e-5)
    assert [item.index for item in answer.data] == [0, 1, 2]
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 10
    assert answer.data[0].embedding == pytest.approx(
        client.embeddings.create(model="", input=TEXTS[0], encoding_format="float",
                                 extra_body={"model": None}).data[0].embedding, abs=1e-5)


def test_shapes_of_input_and_form(server: ServerProcess, truth: dict) -> None:
    def post(**body: object) -> list[dict]:
        answer = server.http.post("/v1/embeddings", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    ids = [server.http.post("/tokenize", json={"prompt": text}).json()["tokens"] for text in TEXTS]
    for value in (TEXTS, ids):
        found = [item["embedding"] for item in post(input=value, pooling="mean")]
        np.testing.assert_allclose(found, truth["mean"], atol=1e-5)
    cut = post(input=ids[0], dimensions=8)[0]["embedding"]
    assert len(cut) == 8 and np.linalg.norm(cut) == pytest.approx(1)
    raw = np.frombuffer(base64.b64decode(post(input="x", encoding_format="base64")[0]["embedding"]), "<f4")
    np.testing.assert_allclose(raw, truth["last"][2], atol=1e-5)
    whole, first = post(input=ids[0])[0]["embedding"], post(input=ids[0], truncate_prompt_tokens=3)[0]["embedding"]
    np.testing.assert_allclose(first, post(input=ids[0][:3])[0]["embedding"], atol=1e-6)
    assert not np.allclose(whole, first)


@pytest.mark.parametrize(("body", "field"), [
    ({"input": ""}, "input"), ({"input": []}, "input"), ({"input": [1, "x"]}, "input"), ({}, "input"),
    ({"input": [10**6]}, "prompt"), ({"input": "x", "dimensions": 0}, "dimensions"),
    ({"input": "x", "dimensions": 10**6}, "dimensions"), ({"input": "x", "pooling": "median"}, "pooling"),
    ({"input": "x", "encoding_format": "hex"}, "encoding_format"), ({"input": list(range(5000))}, "input"),
    ({"input": "x", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"), ({"input": "x", "inputs": 1}, "inputs"),
    ({"input": ["x"] * 5000}, "input"), ({"input": [5], "add_special_tokens": True}, "add_special_tokens"),
], ids=str)
def test_what_is_wrong_is_named(server: ServerProcess, body: dict, field: str) -> None:
    answer = server.http.post("/v1/embeddings", json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == field


def test_scores_are_cosines(server: ServerProcess, truth: dict) -> None:
    vectors = np.array(truth["last"])
    answer = server.http.post("/v1/score", json={"text_1": TEXTS[0], "text_2": TEXTS}).json()
    np.testing.assert_allclose([item["score"] for item in answer["data"]], vectors @ vectors[0], atol=1e-4)
    paired = server.http.post("/score", json={"text_1": TEXTS[:2], "text_2": TEXTS[1:]}).json()
    np.testing.assert_allclose([item["score"] for item in paired["data"]],
                               [vectors[0] @ vectors[1], vectors[1] @ vectors[2]], atol=1e-4)
    assert server.http.post("/score", json={"text_1": TEXTS[:2], "text_2": TEXTS}).status_code == 400


def test_reranking_sorts_by_score(server: ServerProcess, truth: dict) -> None:
    vectors = np.array(truth["last"])
    for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
        answer = server.http.post(path, json={"query": TEXTS[0], "documents": [TEXTS[2], {"text": TEXTS[0]}, TEXTS[1]],
                                              "top_n": 2}).json()
        assert answer["results"][0]["index"] == 1
        assert answer["results"][0]["relevance_score"] == pytest.approx(1, abs=1e-4)
        assert answer["results"][0]["document"] == {"text": TEXTS[0]}
        assert len(answer["results"]) == 2
    expected = sorted(((float(vectors[0] @ vectors[i]), j) for j, i in enumerate((2, 0, 1))), reverse=True)
    assert [result["index"] for result in answer["results"]] == [j for _, j in expected[:2]]
    assert server.http.post("/rerank", json={"query": "x", "documents": [3]}).status_code == 400


def test_beside_a_stream(server: ServerProcess, client: openai.OpenAI, truth: dict) -> None:
    alone = client.completions.create(model="", prompt="import", max_tokens=60, temperature=0,
                                      extra_body={"model": None, "ignore_eos": True}).choices[0].text
    texts: list[str] = []

    def stream() -> None:
        chunks = client.completions.create(model="", prompt="import", max_tokens=60, temperature=0, stream=True,
                                           extra_body={"model": None, "ignore_eos": True})
        texts.append("".join(chunk.choices[0].text for chunk in chunks if chunk.choices))

    thread = threading.Thread(target=stream)
    thread.start()
    for _ in range(5):
        found = server.http.post("/v1/embeddings", json={"input": TEXTS}).json()["data"]
        np.testing.assert_allclose([item["embedding"] for item in found], truth["last"], atol=1e-5)
    thread.join()
    assert texts == [alone]
