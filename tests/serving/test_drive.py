"""`drive`: all APIs begin, fail and end alike, whole and as streams."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.serving.server_process import ServerProcess, wait_for

SAID = "Write a function."
CALLS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": SAID},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": SAID}]},
    "/v1/responses": {"input": SAID},
    "/v1/messages": {"messages": [{"role": "user", "content": SAID}], "max_tokens": 16},
}
LAST_EVENTS = {"/v1/responses": "response.completed response.incomplete", "/v1/messages": "message_stop"}


def asked(server: ServerProcess, path: str, **wishes: Any) -> dict[str, Any]:
    model = server.http.get("/v1/models").json()["data"][0]["id"]
    return {"model": model, "temperature": 0, **CALLS[path], **wishes}


@pytest.mark.parametrize("path", CALLS)
def test_a_stream_ends_in_the_way_of_its_api(server: ServerProcess, path: str) -> None:
    answer = server.http.post(path, json=asked(server, path, stream=True))
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
    blocks = answer.text.removesuffix("\n\n").split("\n\n")
    if path in LAST_EVENTS:
        assert blocks[-1].splitlines()[0].removeprefix("event: ") in LAST_EVENTS[path].split()
        assert "[DONE]" not in answer.text
    else:
        assert blocks[-1] == "data: [DONE]" and not any(block.startswith("event:") for block in blocks)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [path for path in CALLS if path != "/v1/messages"])  # which knows no such field
def test_what_is_refused_at_the_start_has_a_status(server: ServerProcess, path: str, stream: bool) -> None:
    """A generation that cannot be started is no stream that fails."""
    answer = server.http.post(path, json=asked(server, path, stream=stream, timeout_s=-1))
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "timeout_s"
    wait_for(lambda: server.gauge("xllm:num_requests_running") == 0, what="no request is running")


@pytest.mark.parametrize("path", [path for path in CALLS if path not in LAST_EVENTS])  # they can be told to go on
def test_a_reader_that_leaves_ends_its_generation(server: ServerProcess, path: str) -> None:
    body = asked(server, path, stream=True, max_tokens=400, ignore_eos=True)
    with httpx.Client(base_url=server.url, timeout=60) as client, client.stream("POST", path, json=body) as answer:
        next(answer.iter_lines())
    server.wait_idle()
    assert server.http.get("/v1/stats").json()["requests"][0]["finish_reason"] == "abort"
