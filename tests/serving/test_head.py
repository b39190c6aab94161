"""HEAD is GET without the body, on every route that answers GET; and what `/tokenizer_info` tells."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from serving.api.app import ROUTES
from serving.api.gate import Access
from serving.api.route import access_table
from tests.security.wire import request
from tests.serving.server_process import ServerProcess, wait_for
from xllm.text.tokenizer import load_tokenizer

LEVELS = access_table(ROUTES)
OF_MASTERS = {"/cluster"}
GETS = sorted(route.path for route in ROUTES
              if route.method == "GET" and route.access is not Access.ADMIN and "{" not in route.path
              and route.path not in OF_MASTERS)
KEY = "a-key-of-some-length"
CHANGING = {"/metrics", "/v1/stats"}  # times and counts: two answers have different lengths


@pytest.mark.parametrize("path", GETS)
def test_head_is_get_without_its_body(server: ServerProcess, path: str) -> None:
    head = server.http.head(path)
    assert head.status_code == 200 and not head.content
    if path == "/v1/stats/stream":
        assert head.headers["content-type"].startswith("text/event-stream")
        return
    got = server.http.get(path, headers={"X-Request-Id": head.headers["x-request-id"]})  # each call has its own
    names = got.headers.keys() - {"date"}
    assert head.headers.keys() - {"date"} == names
    assert int(head.headers["content-length"]) > 0
    if path not in CHANGING:
        assert {name: head.headers[name] for name in names} == {name: got.headers[name] for name in names}


def test_nothing_follows_the_head(server: ServerProcess) -> None:
    """On the wire, where a client that reads no body would take one for the next answer."""
    for path in ("/metrics", "/health", "/v1/models", "/", "/nothing", "/v1/completions", "/v1/models/nothing"):
        status, answer = request(server.url, "HEAD", path)
        assert status == (404 if "nothing" in path else 405 if path == "/v1/completions" else 200)
        assert answer.endswith(b"\r\n\r\n") and answer.count(b"\r\n\r\n") == 1, path


def test_a_head_of_the_stream_takes_no_viewers_place(server: ServerProcess) -> None:
    for _ in range(40):
        assert server.http.head("/v1/stats/stream").status_code == 200
    with server.http.stream("GET", "/v1/stats/stream") as answer:
        assert answer.status_code == 200
    assert server.http.head("/v1/stats/stream?interval_ms=1").status_code == 400


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with a key that its client has not, and without a tokenizer."""
    with ServerProcess(tmp_path_factory.mktemp("keyed") / "log.txt", "--api-key", KEY, "--skip-tokenizer-init",
                       key="another") as running:
        yield running


def test_the_levels_hold_for_head(keyed: ServerProcess) -> None:
    for path in GETS:
        assert keyed.http.head(path).status_code == (200 if LEVELS[path] is Access.PUBLIC else 401), path
    wait_for(lambda: keyed.health().status_code == 200)


def test_tokenizer_info(server: ServerProcess) -> None:
    info = server.http.get("/tokenizer_info").json()
    tokenizer = load_tokenizer(Path(__file__).parents[2] / "xllm" / "bundled")
    assert info["vocab_size"] == tokenizer.vocab_size and info["model_max_length"] == 512
    assert info["eos_token"] == tokenizer.special_tokens["eos_token"] and "bos_token" not in info
    eos_id, = tokenizer.eos_token_ids
    assert info["added_tokens_decoder"][str(eos_id)]["content"] == info["eos_token"]
    assert server.http.post("/tokenize", json={"prompt": info["eos_token"]}).json()["tokens"] == [eos_id]
    assert (info["add_bos_token"], info["add_eos_token"]) == (False, False)
    assert "chat_template" not in info and "bundled" not in str(info), "neither templates nor folders"


def test_a_client_that_counts_with_the_servers_tokenizer(server: ServerProcess) -> None:
    """As lm-eval's `RemoteTokenizer` asks: ids of the named tokens, texts there and back."""
    def encode(text: str) -> list[int]:
        return server.http.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()["tokens"]

    info = server.http.get("/tokenizer_info").json()
    assert len(encode(info["eos_token"])) == 1 and "pad_token" in info
    ids = encode("def f(x):")
    assert server.http.post("/detokenize", json={"tokens": ids}).json()["prompt"] == "def f(x):"


def test_tokenizer_info_without_a_tokenizer(keyed: ServerProcess) -> None:
    answer = keyed.http.get("/tokenizer_info", headers={"Authorization": f"Bearer {KEY}"})
    assert answer.status_code == 404 and "without a tokenizer" in answer.text
