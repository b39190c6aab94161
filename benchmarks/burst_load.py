"""Running decodes, and a burst of long prompts beside them, over HTTP: `measure` says when each token came."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from serving.commands.bench.null_instance import MODEL
from xllm.errors import XllmError
from xllm.host_port import host_and_port

FIRST_TOKEN, LAST_TOKEN = 16, 900  # of those that prompts are made of. Chosen: behind the special ones, none of them
SLOWEST_S = 240.0  # for a whole run. Chosen: beyond the slowest, 64 tokens a step
_LINE_BYTES = 2**20  # of a line of an answer; the first one holds the prompt's tokens. Chosen: many times that


@dataclass(frozen=True, slots=True, kw_only=True)
class BurstLoad:
    """What is asked for. num_decodes: answers that run all the time, from prompts of `decode_prompt` tokens; they are
    ended when the burst has. num_prompts: of the burst, of `prompt_tokens` each, with answers of `answer_tokens`.
    settle_s: from the first token of the last decode until the run counts. calm_s: from then to the burst. longest:
    tokens that a sequence may have."""

    num_decodes: int
    decode_prompt: int
    num_prompts: int
    prompt_tokens: int
    answer_tokens: int
    settle_s: float
    calm_s: float
    longest: int


@dataclass(slots=True)
class Arrivals:
    """When each token of an answer came, in seconds of `time.monotonic`."""

    times_s: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class BurstRun:
    """began_s: of what counts. burst_s: when the burst was sent. end_s: when all of it was answered."""

    began_s: float
    burst_s: float
    end_s: float
    decodes: list[Arrivals]
    burst: list[Arrivals]


async def measure(address: str, load: BurstLoad) -> BurstRun:
    """One run on the cluster at `address`, HOST:PORT. Raises XllmError if an answer does not come as it should."""
    try:
        return await asyncio.wait_for(_measure(_Asking(address), load), SLOWEST_S)
    except asyncio.TimeoutError:
        raise XllmError(f"a run took more than {SLOWEST_S:g} s") from None


async def _measure(asking: _Asking, load: BurstLoad) -> BurstRun:
    decodes = [Arrivals() for _ in range(load.num_decodes)]
    open_decodes = [asyncio.create_task(asking.ask(load.decode_prompt, load.longest - load.decode_prompt, each))
                    for each in decodes]
    try:
        await _until(lambda: all(each.times_s for each in decodes), open_decodes)
        await asyncio.sleep(load.settle_s)
        began_s = time.monotonic()
        await asyncio.sleep(load.calm_s)
        burst, burst_s = [Arrivals() for _ in range(load.num_prompts)], time.monotonic()
        await asyncio.gather(*(asking.ask(load.prompt_tokens, load.answer_tokens, each) for each in burst))
        end_s = time.monotonic()
        _check(open_decodes)
    finally:
        for task in open_decodes:
            task.cancel()
        await asyncio.gather(*open_decodes, return_exceptions=True)
    if wrong := [len(each.times_s) for each in burst if len(each.times_s) != load.answer_tokens]:
        raise XllmError(f"answers of {load.answer_tokens} tokens were asked for and one of {wrong[0]} came")
    return BurstRun(began_s, burst_s, end_s, decodes, burst)


async def _until(is_so: Callable[[], bool], tasks: list[asyncio.Task[None]]) -> None:
    while not is_so():
        _check(tasks)
        await asyncio.sleep(0.05)


def _check(tasks: list[asyncio.Task[None]]) -> None:
    """Raises XllmError unless all of them still run."""
    for task in tasks:
        if task.done():
            task.result()
            raise XllmError("a decode that was to run all the time has ended: the run was too long for its length")


class _Asking:
    """Asks for completions, each on a connection of its own. No two prompts are the same."""

    def __init__(self, address: str):
        self._host, self._port = host_and_port(address)
        self._rng = random.Random(0)

    async def ask(self, num_prompt: int, num_tokens: int, arrivals: Arrivals) -> None:
        """Note when the tokens of one completion come, until all have. Raises XllmError."""
        body = {"model": MODEL, "prompt": self._rng.choices(range(FIRST_TOKEN, LAST_TOKEN), k=num_prompt),
                "max_tokens": num_tokens, "ignore_eos": True, "temperature": 0, "stream": True,
                "return_token_ids": True}
        try:
            reader, writer = await asyncio.open_connection(self._host, self._port, limit=_LINE_BYTES)
            try:
                writer.write(self._request(body))
                await _read(reader, arrivals)
            finally:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
        except OSError as error:
            raise XllmError(f"the cluster does not answer: {error}") from None

    def _request(self, body: dict[str, Any]) -> bytes:
        content = json.dumps(body).encode()
        return (f"POST /v1/completions HTTP/1.1\r\nHost: {self._host}:{self._port}\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n").encode() + content


async def _read(reader: asyncio.StreamReader, arrivals: Arrivals) -> None:
    head = await reader.readline()
    if b" 200 " not in head:
        raise XllmError(f"the cluster answered {head.decode(errors='replace').strip()}")
    async for line in reader:
        if not line.startswith(b"data: "):
            continue
        if line.startswith(b"data: [DONE]"):
            return
        now_s, chunk = time.monotonic(), json.loads(line[len(b"data: "):])
        if "choices" not in chunk:
            raise XllmError(f"an answer ended with {chunk}")
        arrivals.times_s += [now_s] * sum(len(choice["token_ids"]) for choice in chunk["choices"])
    raise XllmError("the connection was closed within an answer")
