"""`xllm run-batch`: a file of requests in OpenAI's batch format to a file of answers.

Each line is a request, {"custom_id", "method": "POST", "url", "body"}; each answer is written as soon as it is there,
in the order of arrival, so that a run that was interrupted, at whatever byte, goes on where it stopped: what the output
file holds a good answer for is not asked again, and what failed is: its old lines are taken out first. One run at a
time writes to a file. The requests go through a real server, which runs elsewhere (`--url`) or is started here; the
latter ends with this process, however that ends.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import secrets
import signal
import stat
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any, BinaryIO

import httpx

from serving.commands.output_file import check_output, open_locked, replace_locked
from serving.commands.signals import ECHO, EndSignals
from xllm import env
from xllm.child_end import ChildEnd
from xllm.child_process import run_module
from xllm.errors import ConfigError

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/score", "/score", "/v1/rerank", "/rerank")
ADDRESS = re.compile(r"on (https?://127\.0\.0\.1:\d+)")
# Of a request that a busy server refused, and seconds before the first, which double each time. Chosen: a minute in
# all.
RETRIES, RETRY_S = 8, 0.25
BUSY = (429, 503)  # HTTP statuses with which a server asks to come back
START_POLL_S = 0.1  # between looks whether the server is ready. Chosen: a start takes a second or more
LINE_ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"}  # to readers that use `str.splitlines`
JSON = {"Content-Type": "application/json"}
ID_PREFIX = "batch_req_"
ANSWER_START = f'{{"id": "{ID_PREFIX}'.encode()  # of every line of an output file


@dataclass(frozen=True)
class RequestLine:
    """A request. error: why it cannot even be sent; custom_id is then the best name that it has."""

    custom_id: str
    url: str = ""
    body: str = ""  # JSON
    error: str | None = None


def read_lines(file: IO[str]) -> Iterator[RequestLine]:
    """The requests of a batch file; empty lines are none."""
    for number, text in enumerate(file, start=1):
        if text.strip():
            yield _read_line(text, number)


def _read_line(text: str, number: int) -> RequestLine:
    name = f"line-{number}"
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError) as error:
        return RequestLine(name, error=f"line {number} is not JSON that can be read: {error}")
    if not isinstance(entry, dict):
        return RequestLine(name, error=f"line {number} is not a JSON object")
    custom_id = entry.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        return RequestLine(name, error=f"line {number}: custom_id must be a text")
    if entry.get("method", "POST") != "POST":
        return RequestLine(custom_id, error=f"method {entry['method']!r}: only POST is there")
    if entry.get("url") not in URLS:
        return RequestLine(custom_id, error=f"url {entry.get('url')!r}: only {', '.join(URLS)} are there")
    if not isinstance(entry.get("body"), dict):
        return RequestLine(custom_id, error="body must be a JSON object")
    if entry["body"].get("stream"):
        return RequestLine(custom_id, error="body.stream: a batch has no streams")
    try:
        return RequestLine(custom_id, entry["url"], json.dumps(entry["body"]))
    except RecursionError:
        return RequestLine(custom_id, error="body is nested too deeply")


@dataclass
class Found:
    """What an output file holds. done, failed: ids. num_bytes: of whole lines."""

    done: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    num_bytes: int = 0


def read_found(output: Path) -> Found:
    """What is in an output file. Changes nothing.

    Raises:
        ConfigError: the file holds anything else than answers, and the beginning of one behind them.
    """
    found = Found()
    if not output.is_file():
        return found
    content = output.read_bytes()
    found.num_bytes = content.rfind(b"\n") + 1
    try:
        for line in content[:found.num_bytes].splitlines():
            if line.strip():
                custom_id, is_good = _read_answer(line)
                (found.done if is_good else found.failed).add(custom_id)
        begun = content[found.num_bytes:][:len(ANSWER_START)]
        if not (found.done or found.failed) and not ANSWER_START.startswith(begun):
            raise ValueError("the last line is no answer")
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{output} exists and is no output of run-batch ({error}); --no-resume overwrites "
                          "it") from None
    return found


def _read_answer(line: bytes) -> tuple[str, bool]:
    """(its id, whether it is a good one). Raises ValueError."""
    entry = json.loads(line)
    if not isinstance(entry, dict) or not {"custom_id", "response", "error"} <= entry.keys():
        raise ValueError("a line is no answer")
    return str(entry["custom_id"]), entry["error"] is None


def good_lines(output: Path, again: set[str]) -> Iterator[bytes]:
    """The whole lines of an output file, but those of errors whose ids are in `again`."""
    with output.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):  # it was cut off
                return
            if line.strip():
                custom_id, is_good = _read_answer(line)
                if is_good or custom_id not in again:
                    yield line


def answer(line: RequestLine, response: httpx.Response | None, error: str | None = None) -> dict[str, Any]:
    """A line of the output file."""
    shown = None
    if response is not None:
        try:
            body = response.json()
        except ValueError:
            body = {"error": {"message": response.text[:1000]}}
        request_id = body.get("id", "") if isinstance(body, dict) else ""
        shown = {"status_code": response.status_code, "request_id": request_id, "body": body}
    failed = error is not None or response is None or response.status_code >= 400
    return {"id": f"{ID_PREFIX}{uuid.uuid4().hex}", "custom_id": line.custom_id, "response": shown,
            "error": {"code": "invalid_request" if response is None else str(response.status_code),
                      "message": error or "the server refused the request"} if failed else None}


class BatchRun:
    """Sends lines, so many at a time, and writes what comes back."""

    def __init__(self, client: httpx.AsyncClient, output: BinaryIO, *, concurrency: int, advance: Any):
        """output: without a buffer."""
        self._client, self._output, self._advance = client, output, advance
        self._concurrency = concurrency
        self.num_done = self.num_failed = 0

    async def run(self, lines: Iterator[RequestLine]) -> None:
        """Raises ConfigError at the first line that finds no server, or cannot be written: the others are left."""
        senders = [asyncio.create_task(self._answer(lines)) for _ in range(self._concurrency)]
        try:
            await asyncio.gather(*senders)
        finally:
            for sender in senders:
                sender.cancel()
            await asyncio.gather(*senders, return_exceptions=True)

    async def _answer(self, lines: Iterator[RequestLine]) -> None:
        for line in lines:  # all senders share the iterator: each takes the next line
            self._write(answer(line, None, line.error) if line.error else await self._send(line))

    async def _send(self, line: RequestLine) -> dict[str, Any]:
        error = ""
        for attempt in range(RETRIES + 1):
            if attempt:
                await asyncio.sleep(RETRY_S * 2**(attempt - 1))
            try:
                response = await self._client.post(line.url, content=line.body, headers=JSON)
            except httpx.HTTPError as failure:
                error = f"the server cannot be reached: {failure or type(failure).__name__}"
                continue
            if response.status_code not in BUSY or attempt == RETRIES:
                return answer(line, response)
        raise ConfigError(error)

    def _write(self, entry: dict[str, Any]) -> None:
        # Half of a surrogate pair is no UTF-8; its escape in Python is its escape in JSON.
        text = json.dumps(entry, ensure_ascii=False).translate(LINE_ENDS)
        rest = (text + "\n").encode("utf-8", "backslashreplace")
        while rest:
            try:
                rest = rest[self._output.write(rest):]
            except OSError as error:
                raise ConfigError(f"the output cannot be written: {error.strerror}") from None
        self.num_done += 1
        self.num_failed += entry["error"] is not None
        self._advance()


@contextlib.contextmanager
def own_server(flags: list[str]) -> Iterator[tuple[str, str]]:
    """(URL, key) of a server with these flags on a free port, as long as it is needed. Raises ConfigError."""
    key = secrets.token_urlsafe(24)
    with tempfile.NamedTemporaryFile("w+", suffix=".log") as log:
        process = subprocess.Popen([sys.executable, *run_module("serving.commands.owned_server"), "--port", "0",
                                    "--no-enable-log-requests", "--disable-log-stats", *flags], stdout=log,
                                   stdin=subprocess.PIPE, stderr=subprocess.STDOUT, env=env.with_api_key(key))
        try:
            yield _address(process, Path(log.name)), key
        finally:
            process.terminate()
            process.wait()
            assert process.stdin is not None
            process.stdin.close()


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    end = ChildEnd(process)
    while (code := process.poll()) is None:
        if found := ADDRESS.search(log.read_text(encoding="utf-8", errors="replace")):
            return found[1]
        end.look()
        time.sleep(START_POLL_S)
    said = log.read_text(encoding="utf-8", errors="replace").strip()
    raise ConfigError("the server did not start:\n" + (f"{said}\nit {end.reason(code)}" if code < 0 else said))


def run(namespace: argparse.Namespace, flags: list[str]) -> int:
    """flags: for the server that is started unless `--url` names one. 0: every request was answered well, 1: not."""
    source, output = Path(namespace.input_file), Path(namespace.output_file)
    if not source.is_file():
        raise ConfigError(f"there is no file {source}")
    if namespace.concurrency < 1:
        raise ConfigError("concurrency must be at least 1")
    check_output(output, [source])
    try:
        with source.open(encoding="utf-8") as file:
            lines = list(read_lines(file))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source} is not UTF-8: {error}") from None
    with contextlib.ExitStack() as stack:
        stack.enter_context(_ended_by_sigterm())
        target = stack.enter_context(open_locked(output))
        found = _begin_with(output, flags, resume=namespace.resume)
        _check_unique(lines)
        lines = [line for line in lines if line.custom_id not in found.done]
        again = found.failed & {line.custom_id for line in lines}
        url, key = namespace.url, namespace.api_key
        if url is None:
            url, key = stack.enter_context(own_server(flags))
        if again:
            target = stack.enter_context(replace_locked(output, good_lines(output, again)))
        elif stat.S_ISREG(os.fstat(target.fileno()).st_mode):
            os.ftruncate(target.fileno(), found.num_bytes)  # a line that was cut off, or all of it
        batch = asyncio.run(_run(url, key, target, lines, namespace.concurrency, len(found.done)))
    num_left = len(found.failed - again - found.done)  # errors of requests that are in the batch no more
    print(f"{batch.num_done} requests answered, {batch.num_failed} of them with an error"
          + (f"; {len(found.done)} were there already" if found.done else "")
          + (f"; {len(again)} had failed before and were asked again" if again else "")
          + (f"; {num_left} errors are there of requests that the batch does not hold" if num_left else ""))
    return 1 if batch.num_failed or num_left else 0


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM unwinds this process as Ctrl-C does, so that the server that it started is stopped; its echoes do not
    interrupt that."""
    signals = EndSignals()

    def end(signum: int, frame: FrameType | None) -> None:
        if signals.note(signum) is not ECHO:
            raise SystemExit(128 + signum)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _begin_with(output: Path, flags: list[str], *, resume: bool) -> Found:
    """What of the output file may stay. Raises ConfigError.

    A file that the server's flags name, or a file in a folder that they name, is overwritten only if it holds answers.
    """
    try:
        found = read_found(output)
    except ConfigError:
        if resume:
            raise
        check_output(output, [Path(word.partition("=")[2] if word.startswith("--") else word) for word in flags])
        return Found()
    return found if resume else Found()


def _check_unique(lines: list[RequestLine]) -> None:
    seen: set[str] = set()
    for line in lines:
        if line.custom_id in seen:
            raise ConfigError(f"custom_id {line.custom_id!r} stands in the batch twice")
        seen.add(line.custom_id)


async def _run(url: str, key: str | None, output: BinaryIO, lines: list[RequestLine], concurrency: int,
               num_done: int) -> BatchRun:
    from tqdm import tqdm

    headers = {"Authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=None, limits=limits) as client:
        with tqdm(total=len(lines) + num_done, initial=num_done, desc="requests", dynamic_ncols=True) as bar:
            batch = BatchRun(client, output, concurrency=concurrency, advance=bar.update)
            await batch.run(iter(lines))
    return batch
