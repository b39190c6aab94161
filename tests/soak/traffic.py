"""The requests of a soak: what each kind sends, and which answers it accepts.

A kind is a coroutine `(Caller, Random)` that returns the status it got, or LEFT where it hung up on purpose. It raises
Wrong for any answer that it does not accept.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from random import Random
from typing import Any

import httpx

Kind = Callable[["Caller", Random], Awaitable[str]]
LEFT = "left"
MODEL = "demo"
WORDS = ("def", "class", "import", "return", "self", "for", "in", "if", "else", "x", "y", "0", "1", "(", ")", ":", "=",
         "+", ",", "\n", "the", "a", "of", "what", "is", "Python", "list", "file")
ENDS = {"stop", "length"}


class Wrong(Exception):
    """An answer that should not be."""


class Caller:
    """One client with its connections; many requests run on it at once. admin: headers that open `/abort`."""

    def __init__(self, http: httpx.AsyncClient, admin: dict[str, str]):
        self.http, self.admin = http, admin

    async def post(self, path: str, body: dict[str, Any], status: int = 200) -> Any:
        """The parsed answer. Raises Wrong for any other status."""
        answer = await self.http.post(path, json=body)
        if answer.status_code != status:
            raise Wrong(f"{path}: {answer.status_code} instead of {status}: {answer.text[:300]}")
        return answer.json()

    async def events(self, path: str, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """The events of a stream. Raises Wrong for a status other than 200 or a stream that just stops."""
        async with self.http.stream("POST", path, json={**body, "stream": True}) as answer:
            if answer.status_code != 200:
                raise Wrong(f"{path}: {answer.status_code}: {(await answer.aread()).decode()[:300]}")
            async for line in answer.aiter_lines():
                if line == "data: [DONE]":
                    return
                if line.startswith("data: "):
                    yield json.loads(line.removeprefix("data: "))
        raise Wrong(f"{path}: the stream ended without its end mark")


def text(rng: Random, most: int = 40) -> str:
    """Half of them begin alike, so that the prefix cache has something to find."""
    head = ("def main():\n    import os\n    return os.path.join(x, y)\n" * 2) if rng.random() < 0.5 else ""
    return head + " ".join(rng.choices(WORDS, k=rng.randint(1, most)))


def completion_body(rng: Random, **more: Any) -> dict[str, Any]:
    prompt: Any = text(rng) if rng.random() < 0.7 else [rng.randrange(3, 4000) for _ in range(rng.randint(1, 90))]
    return {"model": MODEL, "prompt": prompt, "max_tokens": rng.randint(1, 20), "temperature": rng.choice([0, 1.0]),
            "seed": rng.randrange(2**31), **more}


def chat_body(rng: Random, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text(rng)}]
    if rng.random() < 0.3:
        messages = [{"role": "system", "content": "Be brief."}, *messages]
    return {"model": MODEL, "messages": messages, "max_tokens": rng.randint(1, 20),
            "temperature": rng.choice([0, 1.0]), **more}


def check_whole(answer: dict[str, Any], num_choices: int) -> None:
    """Every choice has ended, and the usage adds up."""
    ends = [choice["finish_reason"] for choice in answer["choices"]]
    usage = answer["usage"]
    if len(ends) != num_choices or not ENDS.issuperset(ends):
        raise Wrong(f"{num_choices} choices were asked for; these ended as {ends}")
    if usage["total_tokens"] != usage["prompt_tokens"] + usage["completion_tokens"] or usage["completion_tokens"] < 1:
        raise Wrong(f"usage does not add up: {usage}")


async def completion(caller: Caller, rng: Random) -> str:
    check_whole(await caller.post("/v1/completions", completion_body(rng)), 1)
    return "200"


async def chat(caller: Caller, rng: Random) -> str:
    check_whole(await caller.post("/v1/chat/completions", chat_body(rng)), 1)
    return "200"


async def choices(caller: Caller, rng: Random) -> str:
    n = rng.randint(2, 5)
    check_whole(await caller.post("/v1/completions", completion_body(rng, n=n, temperature=1.0)), n)
    return "200"


async def priority(caller: Caller, rng: Random) -> str:
    body = completion_body(rng, priority=rng.randint(-3, 3), offline=rng.random() < 0.3)
    check_whole(await caller.post("/v1/completions", body), 1)
    return "200"


async def logprobs(caller: Caller, rng: Random) -> str:
    """As lm-eval asks: lists of tokens, echoed with their log-probabilities."""
    prompts = [[rng.randrange(3, 4000) for _ in range(rng.randint(2, 40))] for _ in range(rng.randint(1, 4))]
    answer = await caller.post("/v1/completions", completion_body(rng, prompt=prompts, max_tokens=1, echo=True,
                                                                  logprobs=1))
    check_whole(answer, len(prompts))
    lengths = [len(choice["logprobs"]["token_logprobs"]) for choice in answer["choices"]]
    if lengths != [len(prompt) + 1 for prompt in prompts]:
        raise Wrong(f"log-probabilities of {lengths} tokens for prompts of {[len(prompt) for prompt in prompts]}")
    return "200"


async def _stream(caller: Caller, path: str, body: dict[str, Any]) -> str:
    options = {"include_usage": True}
    ends, usage = [], None
    async with aclosing(caller.events(path, {**body, "stream_options": options})) as events:
        async for event in events:
            if "error" in event:
                raise Wrong(f"{path}: an error in the stream: {event['error']}")
            ends += [choice["finish_reason"] for choice in event["choices"] if choice["finish_reason"]]
            usage = event.get("usage") or usage
    if len(ends) != body.get("n", 1) or not ENDS.issuperset(ends) or usage is None:
        raise Wrong(f"{path}: a stream that ended as {ends} with usage {usage}")
    return "200"


async def completion_stream(caller: Caller, rng: Random) -> str:
    return await _stream(caller, "/v1/completions", completion_body(rng, n=rng.choice([1, 1, 2]), temperature=1.0))


async def chat_stream(caller: Caller, rng: Random) -> str:
    return await _stream(caller, "/v1/chat/completions", chat_body(rng))


async def stop_strings(caller: Caller, rng: Random) -> str:
    body = completion_body(rng, stop=["\n", "e", "("], max_tokens=60)
    if rng.random() < 0.5:
        return await _stream(caller, "/v1/completions", body)
    answer = await caller.post("/v1/completions", body)
    check_whole(answer, 1)
    if any(word in answer["choices"][0]["text"] for word in body["stop"]):
        raise Wrong(f"a stop string was shown: {answer['choices'][0]['text']!r}")
    return "200"


async def structured(caller: Caller, rng: Random) -> str:
    """A new grammar now and then, mostly the same ones."""
    low = rng.choice([1, 1, 1, rng.randint(2, 5)])
    names = ["red", "green", f"blue{rng.choice([0, 0, 0, rng.randrange(50)])}"]
    wish: dict[str, Any] = rng.choice([{"choice": names}, {"regex": f"[a-z]{{{low},8}}"}, {"json": {
        "type": "object", "properties": {"n": {"enum": [1, 2, low]}}, "required": ["n"],
        "additionalProperties": False}}])
    answer = await caller.post("/v1/completions", completion_body(rng, structured_outputs=wish, max_tokens=40))
    check_whole(answer, 1)
    if "choice" in wish and answer["choices"][0]["text"] not in names:
        raise Wrong(f"{answer['choices'][0]['text']!r} is none of {names}")
    return "200"


async def embeddings(caller: Caller, rng: Random) -> str:
    texts = [text(rng, 12) for _ in range(rng.randint(1, 4))]
    answer = await caller.post("/v1/embeddings", {"model": MODEL, "input": texts})
    if len(answer["data"]) != len(texts):
        raise Wrong(f"{len(answer['data'])} vectors for {len(texts)} texts")
    return "200"


async def responses(caller: Caller, rng: Random) -> str:
    """The server keeps their answers for later calls, so many and no more."""
    answer = await caller.post("/v1/responses", {"model": MODEL, "input": text(rng),
                                                 "max_output_tokens": rng.randint(1, 12)})
    if answer["status"] not in ("completed", "incomplete"):
        raise Wrong(f"a response that is {answer['status']}")
    return "200"


async def messages(caller: Caller, rng: Random) -> str:
    answer = await caller.post("/v1/messages", {"model": MODEL, "max_tokens": rng.randint(1, 12),
                                                "messages": [{"role": "user", "content": text(rng)}]})
    if answer["stop_reason"] not in ("end_turn", "max_tokens"):
        raise Wrong(f"a message that ended as {answer['stop_reason']}")
    return "200"


async def small_things(caller: Caller, rng: Random) -> str:
    tokens = (await caller.post("/tokenize", {"prompt": text(rng)}))["tokens"]
    await caller.post("/detokenize", {"tokens": tokens})
    path = rng.choice(["/metrics", "/v1/models", "/health", "/v1/stats", "/load"])
    answer = await caller.http.get(path)
    if answer.status_code != 200:
        raise Wrong(f"{path}: {answer.status_code}")
    return "200"


WRONG_BODIES: tuple[tuple[str, dict[str, Any], int], ...] = (
    ("/v1/completions", {"prompt": ""}, 400), ("/v1/completions", {"prompt": "x", "temprature": 1}, 400),
    ("/v1/completions", {"prompt": [10**7]}, 400), ("/v1/completions", {"prompt": "x", "n": 0}, 400),
    ("/v1/completions", {"prompt": "x", "max_tokens": 10**6}, 400),
    ("/v1/completions", {"prompt": "x", "structured_outputs": {"regex": "("}}, 400),
    ("/v1/completions", {"prompt": "x", "logit_bias": {"9999999": 1.0}}, 400),
    ("/v1/completions", {"prompt": "x", "model": "another"}, 404),
    ("/v1/chat/completions", {"messages": "x"}, 400), ("/v1/chat/completions", {"messages": [{"role": "user"}] * 5000},
                                                       400),
    ("/v1/embeddings", {"input": []}, 400), ("/v1/nothing", {}, 404), ("/abort", {"abort_all": True}, 403),
)


async def wrong(caller: Caller, rng: Random) -> str:
    path, body, status = rng.choice(WRONG_BODIES)
    answer = await caller.post(path, body, status)
    if answer["error"]["code"] != status or not answer["error"]["message"]:
        raise Wrong(f"{path}: an error without its code or message: {answer}")
    return str(status)


async def leave_unanswered(caller: Caller, rng: Random) -> str:
    """Hangs up while the answer is made."""
    body = completion_body(rng, max_tokens=300, ignore_eos=True)
    task = asyncio.ensure_future(caller.http.post("/v1/completions", json=body))
    await asyncio.wait([task], timeout=rng.random() * 0.5)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return LEFT


async def leave_stream(caller: Caller, rng: Random) -> str:
    num_seen, most = 0, rng.randint(1, 6)
    body = chat_body(rng, max_tokens=300, ignore_eos=True)
    async with aclosing(caller.events("/v1/chat/completions", body)) as events:
        async for _ in events:
            num_seen += 1
            if num_seen >= most:
                break
    return LEFT


async def abort(caller: Caller, rng: Random) -> str:
    """Aborted by its id while it streams: the stream says 503, unless it was faster."""
    name = f"soak-{rng.randrange(2**60)}"
    body = completion_body(rng, request_id=name, max_tokens=300, ignore_eos=True)
    error, num_seen = None, 0
    async with aclosing(caller.events("/v1/completions", body)) as events:
        async for event in events:
            error, num_seen = event.get("error") or error, num_seen + 1
            if num_seen == 1:
                aborted = await caller.http.post("/abort", json={"request_ids": [f"cmpl-{name}"]},
                                                 headers=caller.admin)
                if aborted.status_code != 200:
                    raise Wrong(f"/abort: {aborted.status_code}: {aborted.text[:200]}")
    if error is not None and error["code"] != 503:
        raise Wrong(f"aborted, and told {error}")
    return "200" if error is None else "503 in the stream"


async def too_late(caller: Caller, rng: Random) -> str:
    """More than can be done in its time."""
    body = completion_body(rng, max_tokens=400, ignore_eos=True, timeout_s=0.01)
    await caller.post("/v1/completions", body, 504)
    return "504"


# Kind -> its share of the traffic.
MIX: dict[Kind, int] = {
    completion: 16, chat: 12, completion_stream: 12, chat_stream: 10, choices: 4, priority: 4, logprobs: 5,
    stop_strings: 6, structured: 5, embeddings: 5, responses: 3, messages: 3, small_things: 4, wrong: 6,
    leave_unanswered: 3, leave_stream: 3, abort: 3, too_late: 1,
}
