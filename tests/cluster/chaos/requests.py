"""The requests of a chaos run, and what an answer says that must not depend on where it was computed."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import httpx

PREFIXES = tuple(f"# Module {number}.\n" + "\n".join(
    f"def step_{number}_{line}(items, key):\n    return sorted(items, key=key)[{line}]" for line in range(6))
    for number in range(3))
SCHEMA = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 12}, "done": {"type": "boolean"},
                                           "size": {"type": "integer", "minimum": 0, "maximum": 9999}},
          "required": ["name", "done", "size"], "additionalProperties": False}


@dataclass(frozen=True)
class Asked:
    """One request. name: of what it is in all forms. path: of the API."""

    name: str
    path: str
    body: dict[str, Any]


@dataclass
class Answer:
    """texts, tokens (with log-probabilities), ends: by choice. error: what was said instead of an answer, or in the
    middle of one. status: of HTTP. num_done: how often the stream said that it was complete. longest_gap_s: between two
    events. first_s: when the first one came, on the `time.monotonic()` clock."""

    status: int = 0
    texts: dict[int, str] = field(default_factory=dict)
    tokens: dict[int, list[tuple[str, float]]] = field(default_factory=dict)
    ends: dict[int, list[str]] = field(default_factory=dict)
    usage: tuple[int, int] = (0, 0)
    num_done: int = 0
    num_events: int = 0
    longest_gap_s: float = 0.0
    first_s: float | None = None
    retry_after: str | None = None
    error: str | None = None


def drawn(rng: Random) -> Asked:
    """One of `all_requests`, most often streamed."""
    asked = rng.choice(all_requests())
    if rng.random() < 0.85:
        return replace(asked, body=asked.body | {"stream": True, "stream_options": {"include_usage": True}})
    return asked


def all_requests() -> list[Asked]:
    """Every one, not streamed."""
    return [Asked(f"{kind} {number}", *make(number)) for kind, make in sorted(_KINDS.items()) for number in range(6)]


def _chat(text: str, **fields: Any) -> tuple[str, dict[str, Any]]:
    return "/v1/chat/completions", {"messages": [{"role": "user", "content": text}], **fields}


def _completion(text: str, **fields: Any) -> tuple[str, dict[str, Any]]:
    return "/v1/completions", {"prompt": text, "ignore_eos": True, **fields}


_KINDS = {
    "greedy chat": lambda n: _chat(f"Write a function that sorts {n} items.", temperature=0, max_tokens=60 + n),
    "greedy, long prompt": lambda n: _completion(f"{PREFIXES[n % 3]}\ndef last_{n}(", temperature=0, max_tokens=24),
    "greedy, long answer": lambda n: _completion(f"class Queue{n}:", temperature=0, max_tokens=220),
    "seeded": lambda n: _completion("def quicksort(items):", temperature=0.9, top_k=30, top_p=0.95, seed=n,
                                    max_tokens=120),
    "seeded, penalties": lambda n: _completion(
        f"{PREFIXES[n % 3]}\n", temperature=0.7, seed=n, max_tokens=60, frequency_penalty=0.6, presence_penalty=0.3,
        repetition_penalty=1.1, min_tokens=20),
    "stop strings": lambda n: _completion("import os\n\ndef walk(top):\n", temperature=0.8, seed=100 + n,
                                          max_tokens=150, stop=["return", "\n\n\n", "self.x"]),
    "JSON schema": lambda n: _chat(f"Describe file {n}.", temperature=0.8, seed=n, max_tokens=80, response_format={
        "type": "json_schema", "json_schema": {"name": "file", "schema": SCHEMA, "strict": True}}),
    "n=2": lambda n: _completion(f"{PREFIXES[n % 3]}\nfor name in", temperature=0.9, seed=n, n=2, max_tokens=50),
    "logprobs": lambda n: _completion(f"for line in open({n}):", temperature=0, logprobs=3, max_tokens=60),
    "chat logprobs, n=2": lambda n: _chat(f"What is {n}?", temperature=0.8, seed=n, n=2, max_tokens=40, logprobs=True,
                                          top_logprobs=2),
}


LONGEST = Asked("longest prompt", *_completion("\n".join(
    f"def move_{line}(rows, columns):\n    return [rows[{line}], columns[{line}]]" for line in range(40)),
    temperature=0.8, seed=5, max_tokens=250))


def salted(asked: Asked, salt: str, **fields: Any) -> Asked:
    """The same, streamed, of which no instance has anything cached."""
    return replace(asked, body=asked.body | {"stream": True, "stream_options": {"include_usage": True},
                                             "cache_salt": salt, **fields})


async def ask(http: httpx.AsyncClient, asked: Asked, leave_after: int | None = None) -> Answer:
    """Its answer. leave_after: go away after so many events of a stream. Raises httpx.HTTPError: the connection
    broke."""
    found = Answer()
    if not asked.body.get("stream"):
        response = await http.post(asked.path, json=asked.body)
        _begin(found, response)
        if response.status_code != 200:
            found.error = response.text
        else:
            found.num_done = 1
            _add(found, response.json())
        return found
    async with http.stream("POST", asked.path, json=asked.body) as response:
        _begin(found, response)
        if response.status_code != 200:
            found.error = (await response.aread()).decode()
            return found
        last_s = time.monotonic()
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                found.num_done += 1
            elif line.startswith("data: "):
                now_s = time.monotonic()
                found.longest_gap_s = max(found.longest_gap_s, now_s - last_s)
                last_s, found.first_s = now_s, found.first_s or now_s
                found.num_events += 1
                event = json.loads(line[6:])
                if "error" in event:
                    found.error = str(event["error"])
                else:
                    _add(found, event)
                if found.num_events == leave_after:
                    return found
    return found


def _begin(found: Answer, response: httpx.Response) -> None:
    found.status, found.retry_after = response.status_code, response.headers.get("retry-after")


def _add(found: Answer, event: dict[str, Any]) -> None:
    for choice in event.get("choices", ()):
        index = choice["index"]
        said = choice.get("delta") or choice.get("message") or {"content": choice.get("text")}
        found.texts[index] = found.texts.get(index, "") + (said.get("content") or "")
        found.tokens.setdefault(index, []).extend(_logprobs(choice.get("logprobs")))
        if choice.get("finish_reason") is not None:
            found.ends.setdefault(index, []).append(choice["finish_reason"])
    if event.get("usage"):
        found.usage = event["usage"]["prompt_tokens"], event["usage"]["completion_tokens"]


def _logprobs(shown: dict[str, Any] | None) -> list[tuple[str, float]]:
    if not shown:
        return []
    if "content" in shown:
        return [(one["token"], one["logprob"]) for one in shown["content"] or ()]
    return list(zip(shown["tokens"], shown["token_logprobs"], strict=True))


def difference(found: Answer, expected: Answer, *, is_whole: bool = True) -> str | None:
    """What is wrong with an answer, in words. is_whole: its reader has stayed."""
    if not is_whole:
        for index, text in found.texts.items():
            if not expected.texts[index].startswith(text):
                return f"choice {index} began {text!r} instead of {expected.texts[index]!r}"
        return None
    if found.num_done != 1:
        return f"it was said {found.num_done} times that the stream is complete"
    for what in ("texts", "ends", "usage"):
        if getattr(found, what) != getattr(expected, what):
            return f"{what}: {getattr(found, what)!r} instead of {getattr(expected, what)!r}"
    for index, tokens in expected.tokens.items():
        mine = found.tokens.get(index, [])
        if [token for token, _ in mine] != [token for token, _ in tokens]:
            return f"tokens of choice {index}: {mine!r} instead of {tokens!r}"
        if any(abs(a - b) > 1e-2 for (_, a), (_, b) in zip(mine, tokens, strict=True)):
            return f"log-probabilities of choice {index}: {mine!r} instead of {tokens!r}"
    return None
