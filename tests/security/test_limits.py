"""Every row of the table of limits, hit exactly at the limit and one beyond."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from serving.api.body import _JSON_STRING
from serving.api.call_weight import OUTPUT_TOKEN, PROMPT_COPY, PROMPT_TOKEN, SEQUENCE
from serving.config import LimitSettings, ServerConfig
from serving.engine.waiting import WaitingTokens
from serving.limits import BY_NAME, HARD_MAXIMA, MEDIA, TABLE
from tests.security.wire import request, send
from tests.serving.server_process import ROOT, ServerProcess
from xllm.client.engine_client import EngineBusyError
from xllm.errors import ConfigError
from xllm.request import Request

SMALL = {"max_header_bytes": 2000, "max_headers": 20, "max_url_bytes": 300, "max_body_bytes": 5000, "max_json_depth": 5,
         "max_json_nodes": 200, "max_json_containers": 40, "max_sequences_per_request": 6, "max_messages": 4,
         "max_stop_strings": 3, "max_bad_words": 2, "max_logit_bias": 3, "max_logprobs": 2, "max_queue_tokens": 100,
         "max_tools": 2, "max_template_variables": 3, "max_template_variable_chars": 200, "max_template_chars": 80,
         "max_rendered_chars": 300, "max_call_weight": 78048, "max_text_chars": 4500}
Answer = tuple[int, str]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    flags = [word for name, value in SMALL.items() for word in ("--" + name.replace("_", "-"), str(value))]
    log = tmp_path_factory.mktemp("small") / "log.txt"
    with ServerProcess(log, *flags, "--trust-request-chat-template") as running:
        yield running


def post(server: ServerProcess, path: str = "/v1/completions", **body: Any) -> Answer:
    answer = server.http.post(path, json={"max_tokens": 1, **body})
    return answer.status_code, answer.text


def complete(**body: Any) -> Callable[[ServerProcess], Answer]:
    return lambda server: post(server, **{"prompt": "hi", **body})


def chat(num_messages: int = 1, **body: Any) -> Callable[[ServerProcess], Answer]:
    messages = [{"role": ("user", "assistant")[i % 2], "content": "hi"} for i in range(num_messages)]
    return lambda server: post(server, "/v1/chat/completions", messages=messages, **body)


def variables(**values: Any) -> Callable[[ServerProcess], Answer]:
    """With a template that reads them: another's are refused."""
    source = "{{ messages[0].content }}" + "".join(f"{{{{{name}[0]}}}}" for name in values)
    return chat(chat_template=source, chat_template_kwargs=values)


def head(server: ServerProcess, *, num_bytes: int | None = None, num_headers: int | None = None) -> Answer:
    """Headers of so many bytes, or so many of them; two are there anyway: Connection: close and Host: 127.0.0.1."""
    if num_headers is not None:
        headers = [(f"X-{i}", "v") for i in range(num_headers - 2)]
    else:
        assert num_bytes is not None
        headers = [("X", "v" * (num_bytes - len("connection" "close" "host" "127.0.0.1" "x")))]
    status, received = request(server.url, "GET", "/health", headers)
    return status, received.decode()


def url(server: ServerProcess, num_bytes: int) -> Answer:
    status, received = request(server.url, "GET", "/health?" + "q" * (num_bytes - len("/health")))
    return status, received.decode()


def padded(server: ServerProcess, num_bytes: int) -> Answer:
    body = b'{"prompt": "hi", "max_tokens": 1}'
    answer = server.http.post("/v1/completions", content=body + b" " * (num_bytes - len(body)),
                              headers={"Content-Type": "application/json"})
    return answer.status_code, answer.text


def nested(depth: int) -> Callable[[ServerProcess], Answer]:
    value: Any = []
    for _ in range(depth - 2):
        value = [value]
    return variables(x=value)


def nodes(number: int) -> Callable[[ServerProcess], Answer]:
    """`{"tokens": [...]}`: the object and the list count, and so does every value in the list."""
    return lambda server: _detokenize(server, [5] * (number - 2))


def _detokenize(server: ServerProcess, tokens: list[int]) -> Answer:
    answer = server.http.post("/detokenize", json={"tokens": tokens})
    return answer.status_code, answer.text


def containers(number: int) -> Callable[[ServerProcess], Answer]:
    return variables(x=[[] for _ in range(number - 5)])  # five: body, messages, one, kwargs, x


def tools(number: int) -> Callable[[ServerProcess], Answer]:
    listed = [{"type": "function", "function": {"name": f"f{i}"}} for i in range(number)]
    return chat(tools=listed, tool_choice="none")


def rendered(num_chars: int) -> Callable[[ServerProcess], Answer]:
    """Ten characters a token, so that the queue is not what is full. Two are the message's."""
    num_more = num_chars - len("hi")
    rest = "x" * (num_more % 10)
    return chat(chat_template=f"{{{{ messages[0].content + '<|im_end|>' * {num_more // 10} }}}}" + rest)


def weighing(num_bytes: int) -> Callable[[ServerProcess], Answer]:
    """Six sequences for one prompt token, as long as it takes."""
    rest = num_bytes - 6 * SEQUENCE - PROMPT_TOKEN - 6 * PROMPT_COPY
    return complete(prompt=[5], n=6, max_tokens=-(-rest // (6 * OUTPUT_TOKEN)))


def tokenize(text: str) -> Callable[[ServerProcess], Answer]:
    def ask(server: ServerProcess) -> Answer:
        answer = server.http.post("/tokenize", json={"prompt": text})
        return answer.status_code, answer.text
    return ask


CASES: dict[str, Callable[[int], Callable[[ServerProcess], Answer]]] = {
    "max_header_bytes": lambda n: lambda server: head(server, num_bytes=n),
    "max_headers": lambda n: lambda server: head(server, num_headers=n),
    "max_url_bytes": lambda n: lambda server: url(server, n),
    "max_body_bytes": lambda n: lambda server: padded(server, n),
    "max_json_depth": nested,
    "max_json_nodes": nodes,
    "max_json_containers": containers,
    "max_sequences_per_request": lambda n: complete(n=n),
    "max_call_weight": weighing,
    "max_text_chars": lambda n: tokenize("a" * n),
    "max_messages": chat,
    "max_stop_strings": lambda n: complete(stop=[f"stop{i}" for i in range(n)]),
    "max_bad_words": lambda n: complete(bad_words=[f"bad{i}" for i in range(n)]),
    "max_logit_bias": lambda n: complete(logit_bias={str(i): 1 for i in range(n)}),
    "max_logprobs": lambda n: complete(logprobs=n),
    "max_queue_tokens": lambda n: complete(prompt=[5] * n),
    "max_tools": tools,
    "max_template_variables": lambda n: variables(**{f"x{i}": "1" for i in range(n)}),
    "max_template_variable_chars": lambda n: variables(x="y" * (n - len('{"x": ""}'))),
    "max_template_chars": lambda n: chat(chat_template="{{ messages[0].content }}".ljust(n)),
    "max_rendered_chars": rendered,
}
FIXED: dict[str, Callable[[int], Callable[[ServerProcess], Answer]]] = {
    "MAX_CHOICES": lambda n: complete(n=n),
    "MAX_STOP_STRING_CHARS": lambda n: complete(stop="x" * n),
    "MAX_ALLOWED_TOKEN_IDS": lambda n: complete(allowed_token_ids=[i % 4096 for i in range(n)]),
    "MAX_STOP_TOKEN_IDS": lambda n: complete(stop_token_ids=list(range(n))),
}


def test_no_row_is_without_a_test() -> None:
    """Those of media are in test_media_fetch.py and test_image_header.py."""
    assert {limit.name for limit in TABLE} == CASES.keys() | FIXED.keys() | {limit.name for limit in MEDIA}
    assert CASES.keys() == {limit.name for limit in TABLE if limit.flag} == SMALL.keys()


@pytest.mark.parametrize("name", CASES)
def test_at_the_limit_and_one_beyond(small: ServerProcess, name: str) -> None:
    status, text = CASES[name](SMALL[name])(small)
    assert status == 200, text
    status, text = CASES[name](SMALL[name] + 1)(small)
    assert status == BY_NAME[name].status, text
    assert str(SMALL[name]) in text, "the message says the limit"
    if BY_NAME[name].field:
        assert json.loads(text)["error"]["param"] == BY_NAME[name].field
    if BY_NAME[name].status == 503:
        assert small.http.post("/v1/completions", json={"prompt": [5] * 101}).headers["retry-after"] == "5"


@pytest.mark.parametrize("name", FIXED)
def test_fixed_limits(open_server: ServerProcess, name: str) -> None:
    limit = BY_NAME[name]
    status, text = FIXED[name](limit.default)(open_server)
    assert status == 200, text
    status, text = FIXED[name](limit.default + 1)(open_server)
    assert status == limit.status
    assert str(limit.default) in text


@pytest.mark.parametrize(("path", "field", "extra"), [
    ("/v1/chat/completions", "top_logprobs", {"logprobs": True, "messages": [{"role": "user", "content": "x"}]}),
    ("/v1/completions", "prompt_logprobs", {"prompt": "x"}),
])
def test_the_other_logprobs(small: ServerProcess, path: str, field: str, extra: dict[str, Any]) -> None:
    assert post(small, path, **{field: 2}, **extra)[0] == 200
    status, text = post(small, path, **{field: 3}, **extra)
    assert (status, json.loads(text)["error"]["param"]) == (400, field)


def test_prompts_times_n(small: ServerProcess) -> None:
    assert post(small, prompt=["a", "b", "c"], n=2)[0] == 200
    assert post(small, prompt=["a", "b", "c", "d"], n=2)[0] == 400
    assert post(small, prompt=["a"] * 7)[0] == 400


def test_what_stands_in_strings_does_not_count(small: ServerProcess) -> None:
    for text in ("[{,]}" * 400, '\\"[[[' * 300, "\\" * 900):
        assert post(small, "/tokenize", prompt=text[:1500]) [0] == 400  # max_tokens is no field there
        answer = small.http.post("/tokenize", json={"prompt": text[:1500]})
        assert answer.status_code == 200, answer.text


def test_counting_is_linear_on_hostile_strings() -> None:
    """Megabytes of quotes and escapes, terminated or not."""
    started_s = time.process_time()
    for body in (b'"' * 2**22, b'"\\' * 2**21, b'\\"' * 2**21, b'"' + b'\\"' * 2**21, b'["' * 2**21, b'"\\'):
        _JSON_STRING.sub(b"", body)
    assert time.process_time() - started_s < 5.0
    assert _JSON_STRING.sub(b"", b'{"a\\"[": [1, "],["], "b": "open [') == b"{: [1, ], : "


def test_a_head_without_end_is_cut_off(small: ServerProcess) -> None:
    """Memory for a head is bounded even if its end never comes."""
    for head in (b"GET /health HTTP/1.1\r\nHost: x\r\nX: ", b"GET /"):
        assert send(small.url, head + b"v" * 6000)[0] == 400
        assert send(small.url, head + b"v" * 300_000)[0] in (0, 400), "the answer may be lost with the connection"
    assert small.health().status_code == 200


def test_waiting_tokens_count_up_and_down() -> None:
    waiting = WaitingTokens(10)
    first, second = Request(request_id="a", prompt_token_ids=[1] * 6), Request(request_id="b", prompt_token_ids=[1] * 4)
    waiting.enter([first, second])
    with pytest.raises(EngineBusyError, match="10 prompt tokens wait, and 1 more"):
        waiting.enter([Request(request_id="c", prompt_token_ids=[1])])
    assert waiting.num_tokens == 10, "all or none"
    waiting.leave("a")
    waiting.leave("a")
    waiting.leave("nobody")
    assert waiting.num_tokens == 4
    waiting.enter([first])
    waiting.leave_all(["a", "b"])
    assert waiting.num_tokens == 0


def test_nothing_waits_for_ever_in_the_count(small: ServerProcess) -> None:
    """After calls that ended well, badly and not at all, the whole queue is free again."""
    for _ in range(5):
        assert post(small, prompt=[5] * 60)[0] == 200
        assert post(small, prompt=[5] * 60, max_tokens=10**6)[0] == 400
    small.wait_idle()
    assert post(small, prompt=[5] * 100)[0] == 200


@pytest.mark.parametrize("limit", [limit for limit in TABLE if limit.flag], ids=lambda limit: limit.name)
def test_settings_that_cannot_be(limit: Any) -> None:
    with pytest.raises(ConfigError, match=limit.name):
        ServerConfig(limits=LimitSettings(**{limit.name: limit.at_least - 1}))
    if limit.name in HARD_MAXIMA:
        with pytest.raises(ConfigError, match="at most"):
            ServerConfig(limits=LimitSettings(**{limit.name: HARD_MAXIMA[limit.name] + 1}))
    assert getattr(ServerConfig().limits, limit.name) == limit.default


def test_limits_page_is_up_to_date() -> None:
    result = subprocess.run([sys.executable, "tools/gen_limits.py", "--check"], cwd=ROOT, check=False)
    assert result.returncode == 0, "run tools/gen_limits.py"
