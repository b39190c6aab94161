"""Anything may be sent: the answer is no 5xx, it comes, and the streams of others do not change by a byte."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai

from serving.api.app import ROUTES
from serving.api.routes.openapi import document
from serving.api.tgi_input import TGIParameters
from tests.serving.server_process import ServerProcess

NUM_EXAMPLES = 30 if os.environ.get("FUZZ_ALL") else 6  # of each operation
WITNESS = {"prompt": "import os\n", "max_tokens": 120, "temperature": 0, "extra_body": {"ignore_eos": True}}


class Witness(threading.Thread):
    """Streams the same completion again and again while others misbehave."""

    def __init__(self, client: openai.OpenAI):
        super().__init__()
        self._client, self._ending = client, threading.Event()
        self.texts: list[str] = []
        self.start()

    def run(self) -> None:
        while not self._ending.is_set():
            chunks = self._client.completions.create(model="demo", stream=True, **WITNESS)
            self.texts.append("".join(chunk.choices[0].text for chunk in chunks if chunk.choices))

    def stop(self) -> list[str]:
        self._ending.set()
        self.join(60)
        assert not self.is_alive()
        return self.texts


def test_schemathesis_finds_no_server_error(server: ServerProcess, client: openai.OpenAI, tmp_path: Path) -> None:
    expected = client.completions.create(model="demo", **WITNESS).choices[0].text
    witness = Witness(client)
    done = subprocess.run(
        [str(Path(sys.executable).with_name("schemathesis")), "run", f"{server.url}/openapi.json",
         "--checks", "not_a_server_error", "--max-examples", str(NUM_EXAMPLES), "--seed", "7", "--phases", "fuzzing",
         "--mode", "all", "--request-timeout", "30", "--suppress-health-check", "all", "--workers", "4"],
        cwd=tmp_path, capture_output=True, text=True, timeout=280)
    texts = witness.stop()
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert texts and set(texts) == {expected}
    server.wait_idle()
    assert "Traceback" not in server.log


def test_the_document_names_every_route() -> None:
    paths = document(ROUTES)["paths"]
    assert {route.path.replace(":path", "") for route in ROUTES} - paths.keys() <= {"/web/{name}", "/v1/stats/stream"}
    for path, operations in paths.items():
        for operation in operations.values():
            assert operation["operationId"], path
    assert len(json.dumps(document(ROUTES))) > 10_000


BODIES = {route.path: route.body for route in ROUTES if route.body is not None}
BASES: dict[str, dict] = {
    "/v1/completions": {"prompt": "x", "max_tokens": 1},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1},
    "/v1/responses": {"input": "x", "max_output_tokens": 1},
    "/v1/messages": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1},
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "x"}]},
    "/v1/embeddings": {"input": "x"}, "/v1/sample": {"prompt": "x y", "selector": {"value": "y"}},
    "/v1/score": {"text_1": "x", "text_2": ["y"]}, "/rerank": {"query": "x", "documents": ["y"]},
    "/tokenize": {"prompt": "x"}, "/detokenize": {"tokens": [1]},
    "/generate": {"inputs": "x", "parameters": {"max_new_tokens": 1}},
    "/generate_stream": {"inputs": "x", "parameters": {"max_new_tokens": 1}},
}
NASTY = [None, True, -1, 0, 1, 2**31, 2**63, 2**64, -(2**70), 1e308, 0.5, "", "x", "\x00", "\ud800", "é" * 3000, [],
         [None], [[]], [2**40], ["x"] * 5, {}, {"x": 1}, {"": {"": [{}]}}, [{"role": "tool"}], {"type": "json_object"},
         {"type": "function", "function": {"name": "\x00"}}]


def values_for(name: str) -> list[object]:
    """Some, others for each field; all of them with FUZZ_ALL=1, as `make fuzz` does."""
    return NASTY if os.environ.get("FUZZ_ALL") else random.Random(name).sample(NASTY, 3)


def test_every_field_with_every_kind_of_value(server: ServerProcess, client: openai.OpenAI) -> None:
    expected = client.completions.create(model="demo", **WITNESS).choices[0].text
    bodies = [(path, json.dumps({**base, field: value})) for path, base in BASES.items()
              for field in BODIES[path].model_fields for value in values_for(path + field)]
    bodies += [("/generate", json.dumps({"inputs": "x", "parameters": {"max_new_tokens": 1, field: value}}))
               for field in TGIParameters.model_fields for value in values_for(field)]

    def send(path: str, body: str) -> None:
        response = server.http.post(path, content=body, headers={"Content-Type": "application/json"})
        assert response.status_code < 500, (path, body[:500], response.text[:500])

    witness = Witness(client)
    with ThreadPoolExecutor(4) as pool:
        sent = [pool.submit(send, *each) for each in bodies]
    texts = witness.stop()
    for each in sent:
        each.result()
    assert len(sent) > 500 and texts and set(texts) == {expected}
    server.wait_idle()
    assert "Traceback" not in server.log
