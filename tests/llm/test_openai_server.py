"""`OpenAIServer` and servers that refuse, fail, hang or are none; tests/serving/test_openai_servers.py: real ones."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import pytest
import zmq

from tests.llm.cluster_sites import answers, make_request
from tests.llm.test_clients import read
from tests.llm.test_openai_wire import METRICS, USAGE, chunk
from tests.llm.test_remote import until
from xllm.client import openai_server
from xllm.client.cluster import ClusterClient
from xllm.client.engine_client import EngineBusyError
from xllm.client.openai_server import OpenAIServer
from xllm.client.server_place import KVEventsPlace, ServerPlace
from xllm.errors import EngineDeadError, RequestError
from xllm.request import FinishReason

BUNDLED = str(Path(openai_server.__file__).parents[1] / "bundled")
MODELS = json.dumps({"data": [{"id": "demo", "root": "demo", "parent": None, "max_model_len": 512}]})
ANSWER = [chunk([5]), chunk([6], "length"), USAGE, b"[DONE]"]
Answer = tuple[int, str] | list[bytes | None]  # None: hang there; a list that does not end with [DONE] is cut off


class Scripted:
    """A server that answers as the test says. paths: by path; completions: for each call the next one, the last for
    all that follow. gone: connections of completions that the client has closed."""

    def __init__(self) -> None:
        self.paths: dict[str, tuple[int, str]] = {"/v1/models": (200, MODELS), "/metrics": (200, METRICS),
                                                  "/health": (200, "")}
        self.completions: list[Answer] = [ANSWER]
        self.bodies: list[dict] = []
        self.keys: set[str] = set()
        self.num_gone = 0
        self.hangs = False

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                lines = head.decode().split("\r\n")
                headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
                self.keys.add(headers.get("authorization", ""))
                content = await reader.readexactly(int(headers.get("content-length", "0")))
                if self.hangs:
                    await asyncio.sleep(60)
                path = lines[0].split(" ")[1]
                if path != "/v1/completions":
                    self._whole(writer, *self.paths[path])
                    continue
                self.bodies.append(json.loads(content))
                found = self.completions.pop(0) if len(self.completions) > 1 else self.completions[0]
                if isinstance(found, tuple):
                    self._whole(writer, *found)
                    continue
                await self._stream(reader, writer, found)
                return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    def _whole(self, writer: asyncio.StreamWriter, status: int, body: str) -> None:
        writer.write(f"HTTP/1.1 {status} X\r\ncontent-length: {len(body.encode())}\r\n\r\n{body}".encode())

    async def _stream(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, events: list[bytes | None]
                      ) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        for event in events:
            if event is None:
                await reader.read()
                self.num_gone += 1
                return
            data = b"data: " + event + b"\n\n"
            writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
            await writer.drain()
        if events[-1] == b"[DONE]":
            writer.write(b"0\r\n\r\n")


@contextlib.asynccontextmanager
async def scripted() -> AsyncIterator[tuple[Scripted, Callable[..., OpenAIServer]]]:
    """The server, and what makes clients of it."""
    script, made = Scripted(), list[OpenAIServer]()
    listening = await asyncio.start_server(script.serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"

    def client(**options: float) -> OpenAIServer:
        made.append(OpenAIServer(ServerPlace(name="a", url=url, api_key="k", tokenizer_path=BUNDLED), **options))
        return made[-1]

    try:
        yield script, client
    finally:
        for one in made:
            one.close()
            await one.closed()
        listening.close()


async def why_not(client: OpenAIServer) -> str:
    with pytest.raises(EngineDeadError) as found:
        await client.connect()
    assert client.dead_reason == str(found.value) and not client.is_up
    return str(found.value)


async def test_an_answer() -> None:
    async with scripted() as (script, make):
        client = make()
        facts = await client.connect()
        assert (facts.max_model_len, facts.vocab_size, facts.num_blocks) == (512, 4096, 200)
        assert client.is_up and client.incarnation == "1796073061.030" and script.keys == {"bearer k"}
        stream = client.submit([make_request("r/0"), make_request("r/1")])
        await stream.admitted()
        found = answers(await read(stream))
        assert {name: (one.token_ids, one.finish_reasons, one.cached) for name, one in found.items()} == \
            dict.fromkeys(("r/0", "r/1"), ([5, 6], [FinishReason.LENGTH], 2))
        assert [body["request_id"] for body in script.bodies[1:]] == ["r-0", "r-1"] and not client.request_ids
        heard = asyncio.Event()
        client.on_condition = heard.set
        await asyncio.wait_for(heard.wait(), 5)
        assert (client.stats.num_running, client.stats.num_waiting, client.stats.num_free_blocks) == (3, 4, 150)


@pytest.mark.parametrize(("path", "answer", "reason"), [
    ("/v1/models", (401, '{"error": {"message": "Unauthorized"}}'), "its /v1/models answers HTTP 401: Unauthorized"),
    ("/v1/models", (200, '{"data": []}'), "its /v1/models names no model"),
    ("/v1/models", (200, "<html>"), "Expecting value"), ("/v1/completions", (403, "no"), "HTTP 403: no"),
    ("/v1/completions", [chunk(None)], "return_token_ids needs vLLM 0.10.2"),
    ("/v1/completions", [chunk([5])], "the connection was lost"),
    ("/v1/completions", (400, '{"error": {"message": "m", "param": "p"}}'), "^m$")])
async def test_what_is_no_server_for_us(path: str, answer: Answer, reason: str) -> None:
    async with scripted() as (script, make):
        if path == "/v1/completions":
            script.completions = [answer]
        else:
            assert isinstance(answer, tuple)
            script.paths[path] = answer
        with pytest.raises(EngineDeadError, match=reason):
            await make().connect()


async def test_nobody_listens() -> None:
    async with scripted() as (_, make):
        pass
    assert await why_not(make()) == "nothing listens there, or the connection is refused"


async def test_refusals_and_losses_of_one_call() -> None:
    """The server stays; a call of several sequences ends as one."""
    async with scripted() as (script, make):
        client = make()
        await client.connect()
        for answer, error, said in (
                ((400, '{"error": {"message": "bad", "param": "top_p"}}'), RequestError, "bad"),
                ([b'{"error": {"message": "late", "code": 400}}'], RequestError, "late"),
                ((503, '{"error": {"message": "full"}}'), EngineBusyError, "full"),
                ((500, '{"error": {"message": "oops"}}'), EngineDeadError, "HTTP 500: oops"),
                ([chunk([5])], EngineDeadError, "the connection was lost"),
                ([chunk([5]), b"[DONE]"], EngineDeadError, "the answer ended before its end")):
            script.completions = [[None], answer]
            stream = client.submit([make_request("r/0"), make_request("r/1")])
            with pytest.raises(error, match=said):
                await read(stream)
            assert not client.request_ids and client.is_up
            await until(lambda: not client._tasks)
        await until(lambda: script.num_gone == 6)


async def test_an_abort_closes_the_connection() -> None:
    async with scripted() as (script, make):
        client = make()
        await client.connect()
        script.completions = [[chunk([5]), None]]
        stream = client.submit([make_request("r")])
        await stream.admitted()
        client.abort(["r"])
        (answer,) = answers(await read(stream)).values()
        assert answer.finish_reasons == [FinishReason.ABORT] and not client.request_ids
        await until(lambda: script.num_gone == 1)
        stream = client.submit([make_request("s")])
        await stream.admitted()
        stream.close()
        await until(lambda: script.num_gone == 2)


async def test_a_server_is_lost() -> None:
    async with scripted() as (script, make):
        for what, reason in (("health", "its /health answers HTTP 503: gone"), ("start", "it was started again"),
                             ("key", "HTTP 401: no"), ("hang", "no answer of its /health for 1"),
                             ("stuck", "its engine has made no progress for 1")):
            script.paths |= {"/health": (200, ""), "/metrics": (200, METRICS)}
            script.completions, script.hangs = [ANSWER], False
            client = make(silence_s=1.0, progress_s=1.5)
            await client.connect()
            lost: list[str] = []
            client.on_lost = lost.append
            script.completions = [[chunk([5]), None]]
            stream = client.submit([make_request("r")])
            await stream.next()
            if what == "health":
                script.paths["/health"] = (503, '{"status": "dead", "reason": "gone"}')
            elif what == "start":
                script.paths["/metrics"] = (200, METRICS.replace("1.79607306103e+09", "1.79607400000e+09"))
            elif what == "key":
                script.completions = [(401, "no")]
                client.submit([make_request("s")])
            script.hangs = what == "hang"
            with pytest.raises(EngineDeadError, match=reason):
                await asyncio.wait_for(stream.next(), 6)
            assert len(lost) == 1 and lost[0].startswith(reason) and not client.is_up and not client.request_ids


async def test_commands_are_refused() -> None:
    async with scripted() as (_, make):
        client = make()
        await client.connect()
        assert (await client.control("state")).error is None
        assert "takes no commands" in ((await client.control("pause", mode="keep")).error or "")
        await client.control_or_log("load_adapter", name="a", folder="/a")
        assert client.is_up
        with pytest.raises(EngineDeadError, match="the other instances have got the command sleep"):
            await client.control_or_log("sleep", level=1)
        assert not client.is_up


async def test_blocks_of_another_size_are_said_once(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """Its /metrics speak of blocks of 32 tokens, its events of 16."""
    endpoint = f"ipc://{tmp_path}/events"
    context = zmq.Context()
    publisher = context.socket(zmq.PUB)
    publisher.bind(endpoint)
    async with scripted() as (_, make):
        client, cluster = make(), ClusterClient()
        client.kv_events = KVEventsPlace(endpoint)
        await client.connect()
        cluster.join("a", client)
        number = itertools.count()

        def is_told() -> bool:
            stored = ["BlockStored", [7], None, list(range(16)), 16, None, "GPU", None]
            batch = msgspec.msgpack.encode([time.time(), [stored], 0])
            publisher.send_multipart([b"", next(number).to_bytes(8, "big"), batch])
            client.on_condition()
            return bool(cluster.num_cached_blocks("a")) and bool(caplog.records)

        await until(is_told)
        client.on_condition()
        said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert said == ["a: its KV events are of blocks of 16 tokens, prompts are looked up in blocks of 32: nothing "
                        "that it has cached is found"]
        cluster.leave("a", "the test is over")
        await cluster.close()
    context.destroy(linger=0)
