"""`xllm generate` and `xllm chat`: models in the terminal, in this process or on a running server."""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xllm.config import EngineConfig
from xllm.errors import ConfigError, EngineDeadError, RequestError

if TYPE_CHECKING:
    from xllm.async_llm import AsyncLLM
    from xllm.outputs import RequestOutput
    from xllm.request import SamplingParams

TerminalMessage = dict[str, str]
Ask = Callable[[list[TerminalMessage]], Iterator[str]]  # a conversation to the pieces of its answer


def generate(config: EngineConfig, flags: argparse.Namespace) -> int:
    """Complete all prompts at once; print them in their order, the first as it comes."""
    llm = _load(config)
    try:
        asyncio.run(_generate_all(llm, flags.prompt, _sampling(llm, flags), flags.stats))
    finally:
        llm.shutdown()
    return 0


async def _generate_all(llm: AsyncLLM, prompts: list[str], sampling: SamplingParams, stats: bool) -> None:
    started_s = time.perf_counter()
    queues: list[asyncio.Queue[RequestOutput | Exception]] = [asyncio.Queue() for _ in prompts]
    tasks = [asyncio.create_task(_collect(llm.generate(prompt, sampling, output_kind="delta"), queue))
             for prompt, queue in zip(prompts, queues, strict=True)]
    num_tokens, first_s = 0, None
    for index, queue in enumerate(queues):
        if len(prompts) > 1:
            print(f"--- {index + 1}: {prompts[index]}")
        while True:
            output = await queue.get()
            if isinstance(output, Exception):
                raise output
            first_s = first_s or time.perf_counter()
            num_tokens += len(output.outputs[0].token_ids)
            print(output.outputs[0].text, end="", flush=True)
            if output.finished:
                if output.outputs[0].finish_reason == "error":
                    raise RequestError(f"generation failed: {output.outputs[0].error or 'unknown reason'}")
                break
        print()
    await asyncio.gather(*tasks)
    if stats and first_s is not None:
        total_s = time.perf_counter() - started_s
        print(f"[{len(prompts)} prompts, {num_tokens} tokens in {total_s:.2f} s: {num_tokens / total_s:.1f} tokens/s; "
              f"first token after {1000 * (first_s - started_s):.0f} ms]", file=sys.stderr)


async def _collect(outputs: AsyncIterator[RequestOutput], queue: asyncio.Queue[RequestOutput | Exception]) -> None:
    try:
        async for output in outputs:
            queue.put_nowait(output)
    except Exception as error:
        queue.put_nowait(error)


def chat(config: EngineConfig | None, flags: argparse.Namespace) -> int:
    """Read lines, print answers, until the end of input or /exit. `config` None: talk to `flags.url`."""
    if config is None:
        return _converse(_remote(flags), flags.system)
    llm = _load(config)
    loop = asyncio.new_event_loop()
    try:
        return _converse(_local(llm, _sampling(llm, flags), loop), flags.system)
    finally:
        llm.shutdown()
        loop.close()


def _converse(ask: Ask, system: str | None) -> int:
    start = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    interactive = sys.stdin.isatty()
    if interactive:
        print("Type a message; /clear forgets the conversation, /exit or Ctrl-D ends it.")
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            return 0
        if line == "/exit":
            return 0
        if line == "/clear":
            messages = list(start)
        elif line:
            messages.append({"role": "user", "content": line})
            answer = _print_answer(ask, messages)
            if answer is None:
                messages.pop()  # a message that was refused would be refused again with the next one
            else:
                messages.append({"role": "assistant", "content": answer})


def _print_answer(ask: Ask, messages: list[TerminalMessage]) -> str | None:
    """Print an answer as it comes; Ctrl-C ends it early. Returns its text, None if it failed."""
    pieces: list[str] = []
    answer = ask(messages)
    try:
        for piece in answer:
            pieces.append(piece)
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    except RequestError as error:
        print(f"[{error}]")
        return None
    finally:
        answer.close()  # type: ignore[attr-defined]
    print()
    return "".join(pieces)


def _local(llm: AsyncLLM, sampling: SamplingParams, loop: asyncio.AbstractEventLoop) -> Ask:
    def ask(messages: list[TerminalMessage]) -> Iterator[str]:
        if llm.tokenizer is None:
            raise RequestError("chat needs a tokenizer")
        prompt_ids = llm.tokenizer.encode_chat(messages)[1]
        outputs: Any = llm.generate(prompt_ids, sampling, output_kind="delta")
        waiting: asyncio.Task[Any] | None = None
        try:
            while True:
                waiting = loop.create_task(_next_or_none(outputs))
                if (output := loop.run_until_complete(waiting)) is None:
                    break
                yield output.outputs[0].text
        finally:
            if waiting is not None and not waiting.done():  # Ctrl-C left the loop in the middle of it
                waiting.cancel()
                loop.run_until_complete(asyncio.gather(waiting, return_exceptions=True))
            loop.run_until_complete(outputs.aclose())

    return ask


async def _next_or_none(outputs: AsyncIterator[RequestOutput]) -> RequestOutput | None:
    return await anext(outputs, None)


def _remote(flags: argparse.Namespace) -> Ask:
    url = flags.url.rstrip("/").removesuffix("/v1") + "/v1/chat/completions"
    headers = {"Content-Type": "application/json"}
    if flags.api_key:
        headers["Authorization"] = f"Bearer {flags.api_key}"
    wishes = {"temperature": flags.temperature, "top_p": flags.top_p, "max_tokens": flags.max_tokens, "stream": True}

    def ask(messages: list[TerminalMessage]) -> Iterator[str]:
        body = {"messages": messages, **{name: value for name, value in wishes.items() if value is not None}}
        try:
            request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        except ValueError as error:
            raise ConfigError(f"url: {error}") from None
        try:
            with urllib.request.urlopen(request) as response:
                yield from _read_events(response)
        except urllib.error.HTTPError as error:
            raise RequestError(_message_of(error.read(), f"HTTP {error.code}")) from None
        except urllib.error.URLError as error:
            raise EngineDeadError(f"no answer from {url}: {error.reason}") from None
        except (OSError, http.client.HTTPException) as error:
            raise EngineDeadError(f"{url} stopped answering: {error or type(error).__name__}") from None

    return ask


def _read_events(lines: Iterator[bytes]) -> Iterator[str]:
    for line in lines:
        if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
            continue
        content = json.loads(line[6:])
        if "error" in content:
            raise RequestError(content["error"]["message"])
        for choice in content["choices"]:
            yield choice["delta"].get("content") or ""


def _message_of(body: bytes, otherwise: str) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return otherwise


def _load(config: EngineConfig) -> AsyncLLM:
    from xllm.async_llm import AsyncLLM

    return AsyncLLM(config=config)


def _sampling(llm: AsyncLLM, flags: argparse.Namespace) -> SamplingParams:
    """The flags over the model's generation_config.json. Raises RequestError."""
    from xllm.generation_config import read_sampling_defaults
    from xllm.request import SamplingParams

    defaults = read_sampling_defaults(llm.config.model.generation_config, Path(llm.facts.model_path))
    given = {"temperature": flags.temperature, "top_p": flags.top_p, "max_tokens": flags.max_tokens}
    return SamplingParams(**{**defaults, **{name: value for name, value in given.items() if value is not None}})
