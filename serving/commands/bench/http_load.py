"""`HttpLoad`: many chats or completions at a time over HTTP/1.1, with little work in this process: the server's is
measured."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from xllm.errors import XllmError
from xllm.host_port import host_and_port

_LENGTH = re.compile(rb"\r\ncontent-length: (\d+)\r\n", re.IGNORECASE)
# Of a chunk of a chat that has any; a completion has no chunk before its first token.
_TEXT = re.compile(rb'"content": ?"[^"]|"text": ?"')
_USAGE = {name: re.compile(rb'"%s": ?(\d+)' % name.encode()) for name in ("prompt_tokens", "completion_tokens")}
_LAST_CHUNK = b"\r\n0\r\n\r\n"  # of a chunked body (RFC 9112, 7.1)
_READ_BYTES = 2**16  # Chosen: more than a step of the server writes


@dataclass(frozen=True, slots=True)
class ChatAnswer:
    """first_s: seconds until the first text came; of an answer that was not streamed, until all of it did. num_writes:
    how often something of it came."""

    num_prompt_tokens: int
    num_tokens: int
    first_s: float
    num_writes: int


class HttpLoad:
    """address: HOST:PORT of a server."""

    def __init__(self, address: str):
        self._host, self._port = host_and_port(address)

    async def ask(self, bodies: Sequence[dict[str, Any]], num_open: int) -> list[ChatAnswer]:
        """Send all of these chats, so many at a time, each on a connection that is kept. Raises XllmError if one is not
        answered."""
        requests = iter([(bool(body.get("stream")), self._request("/v1/chat/completions", body)) for body in bodies])
        answers = list[ChatAnswer]()

        async def one_after_the_other() -> None:
            reader, writer = await asyncio.open_connection(self._host, self._port)
            try:
                for is_stream, request in requests:
                    writer.write(request)
                    answers.append(await _read(reader, is_stream))
            finally:
                writer.close()

        try:
            await asyncio.gather(*(one_after_the_other() for _ in range(num_open)))
        except (OSError, EOFError) as error:
            raise XllmError(f"the server at {self._host}:{self._port} does not answer: {error}") from None
        return answers

    async def ask_in_time(self, path: str, bodies: Iterable[tuple[float, dict[str, Any]]]) -> list[ChatAnswer | str]:
        """Send each of these streamed requests when it is due, however many are open, each on a connection of its own.
        bodies: seconds from now, rising, and what is sent. first_s counts from when a request was due. An answer that
        did not come is told in words."""
        began_s, open_answers = time.perf_counter(), list[asyncio.Task[ChatAnswer | str]]()
        for due_s, body in bodies:
            request = self._request(path, body)
            await asyncio.sleep(max(0.0, began_s + due_s - time.perf_counter()))
            open_answers.append(asyncio.create_task(self._ask_once(request, began_s + due_s)))
        return await asyncio.gather(*open_answers)

    async def _ask_once(self, request: bytes, due_s: float) -> ChatAnswer | str:
        try:
            reader, writer = await asyncio.open_connection(self._host, self._port)
            try:
                writer.write(request)
                late_s = time.perf_counter() - due_s
                answer = await _read(reader, True)
            finally:
                writer.close()
        except (OSError, EOFError, XllmError) as error:
            return str(error)
        return replace(answer, first_s=answer.first_s + late_s)

    def _request(self, path: str, body: dict[str, Any]) -> bytes:
        content = json.dumps(body).encode()
        return (f"POST {path} HTTP/1.1\r\nHost: {self._host}:{self._port}\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(content)}\r\n\r\n").encode() + content


async def _read(reader: asyncio.StreamReader, is_stream: bool) -> ChatAnswer:
    began_s = time.perf_counter()
    head = await reader.readuntil(b"\r\n\r\n")
    if b" 200 " not in head[:16] or is_stream == bool(length := _LENGTH.search(head)):
        raise XllmError(f"the server answered {head.decode(errors='replace')}"
                        f"{(await reader.read(_READ_BYTES)).decode(errors='replace')}")
    if length is not None:
        return _answer(await reader.readexactly(int(length[1])), time.perf_counter() - began_s, 1)
    content, first_s, num_writes = bytearray(), 0.0, 0
    while not content.endswith(_LAST_CHUNK):
        if not (part := await reader.read(_READ_BYTES)):
            raise EOFError("the connection was closed within an answer")
        num_writes += 1
        if not first_s and _TEXT.search(part):
            first_s = time.perf_counter() - began_s
        content += part
    return _answer(content, first_s, num_writes)


def _answer(content: bytes | bytearray, first_s: float, num_writes: int) -> ChatAnswer:
    found = {name: pattern.search(content) for name, pattern in _USAGE.items()}
    if (prompt := found["prompt_tokens"]) is None or (output := found["completion_tokens"]) is None:
        raise XllmError(f"an answer has no usage: {content[-500:].decode(errors='replace')}")
    return ChatAnswer(int(prompt[1]), int(output[1]), first_s, num_writes)
