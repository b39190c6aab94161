"""`OpenAIServer`: a client of an engine behind OpenAI's HTTP API with vLLM's fields, such as `vllm serve`.

Token ids go there and come back; stop strings, tool calls and texts stay with whoever uses this. Commands about the
engine as a whole (pauses, adapters) have no place in that API and are refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Sequence
from typing import Any

import httpx

from xllm.client.engine_client import Stream
from xllm.client.gate_wire import UNCHECKED, ServedModel
from xllm.client.member_client import MemberClient
from xllm.client.openai_facts import ModelCard, ServerMetrics, read_card, read_facts, read_metrics
from xllm.client.openai_wire import ChunkReader, completion_body, data_lines, error_of, first_refusal
from xllm.client.server_place import ServerPlace
from xllm.engine.commands import Abort, Action, Command, Controlled, EngineState, Expected, Refused, Submit
from xllm.engine.facts import EngineFacts
from xllm.errors import EngineDeadError, RequestError
from xllm.kv_offer import KVOffer
from xllm.request import FinishReason, OutputDelta, Request, SamplingParams

LOOK_S = 0.5  # between looks at its health and load. Chosen: as the signs of life of our own instances
CONNECT_S = 5.0  # for the server to answer. Chosen: many times a way through a network
# Without an answer of its /health the server is lost; without progress of its engine, too. As `xllm/client/remote.py`.
SILENCE_S, PROGRESS_S = 5.0, 60.0
TRY_S = 60.0  # for the one token that is asked for to begin with. Chosen: a server that compiles takes its time
# Behind HTTP 200 a request counts as taken after so long, or with its first token: vLLM says what it refuses in the
# stream, before it queues it. Chosen: many times what that takes.
ADMIT_S = 1.0
MAX_ERROR_BYTES = 2**16  # of an answer that refuses. Chosen: more than an error of the API has
MAX_EVENT_BYTES = 2**24  # of a stream. Chosen: the ids of the longest prompts, which the first event has, are less
_BUSY = (429, 503)  # HTTP statuses of a server without room (RFC 6585, RFC 9110)
_COMMANDS = "an OpenAI server (--openai-server) takes no commands"
logger = logging.getLogger("xllm.client")


class OpenAIServer(MemberClient):
    """A `WatchedEngine` behind `place.url`. Make it, `await connect()`, use it, `close()` it.

    silence_s, progress_s: how long /health may give no answer, and its counts of tokens and steps may stand still while
    it has requests, before it counts as lost; 0: for ever. One that is lost stays so until `connect` is called again.
    """

    def __init__(self, place: ServerPlace, *, silence_s: float = SILENCE_S, progress_s: float = PROGRESS_S):
        super().__init__(place.url)
        self._place, self._silence_s, self._progress_s = place, silence_s, progress_s
        self.kv_events, self.takes_commands = place.events, False
        self._http: httpx.AsyncClient | None = None
        self._card = ModelCard((), "", 0)
        self._tasks: dict[str, asyncio.Task[None]] = {}  # by request id
        self._watching: asyncio.Task[None] | None = None
        self._closing = set[asyncio.Task[None]]()
        self._look_now = asyncio.Event()
        self._heard_s = self._moved_s = time.monotonic()
        self._counts = (0, 0, 0)  # of tokens and steps, as it said last

    # --- connecting

    async def connect(self) -> EngineFacts:
        """See `MemberClient.connect`: it is asked what it serves, and for one token, so that a wrong key, or a server
        that sends no token ids, is found now."""
        self._leave("it is connected again")
        self.dead_reason, self.phase = None, "connecting"
        headers = {} if self._place.api_key is None else {"Authorization": f"Bearer {self._place.api_key}"}
        self._http = httpx.AsyncClient(
            base_url=self._place.url, headers=headers, trust_env=False, follow_redirects=False,
            timeout=httpx.Timeout(CONNECT_S, read=None, pool=None), limits=httpx.Limits(max_connections=None))
        try:
            await self._greet()
        except (EngineDeadError, RequestError) as error:
            self._die(str(error))
        except (httpx.HTTPError, OSError, ValueError) as error:
            self._die(_why(error))
        except BaseException:
            self._die("connecting was given up")
            raise
        self._check_up()
        assert self.facts is not None
        return self.facts

    async def _greet(self) -> None:
        self._card = read_card((await self._get("/v1/models")).json())
        metrics = await self._metrics()
        self.facts = await asyncio.to_thread(read_facts, self._card, metrics, self._place.tokenizer_path)
        await asyncio.wait_for(self._try(self.facts), TRY_S)
        self.model = ServedModel(self._card.names, UNCHECKED)
        self.started_unix_s = metrics.started_unix_s or time.time()
        # What counts on under one name is one life of the server.
        self.incarnation = f"{metrics.started_unix_s:.3f}" if metrics.started_unix_s else secrets.token_hex(8)
        self._heard_s = self._moved_s = time.monotonic()
        self.stats = metrics.stats
        self.phase = "ready"
        self._watching = asyncio.create_task(self._watch(), name=f"openai-server-{self._place.name}")

    async def _try(self, facts: EngineFacts) -> None:
        """Ask for one token. Raises what says why that fails."""
        request = Request(request_id="try", prompt_token_ids=(0, 1), sampling=SamplingParams(
            temperature=0.0, max_tokens=1, ignore_eos=True))
        reader = ChunkReader(request, facts.vocab_size)
        async for _ in self._answer(request, reader):
            pass
        if not reader.is_done:
            raise EngineDeadError("it ends answers before their end")

    async def _get(self, path: str, timeout_s: float = CONNECT_S) -> httpx.Response:
        assert self._http is not None
        answer = await self._http.get(path, timeout=timeout_s)
        if answer.status_code != 200:
            raise EngineDeadError(_refused_text(path, answer))
        return answer

    async def _metrics(self) -> ServerMetrics:
        """Empty if there are none: what was sent there is counted here in any case."""
        assert self._http is not None
        answer = await self._http.get("/metrics", timeout=CONNECT_S)
        if answer.status_code != 200 and self.phase == "connecting":
            logger.warning("%s: its /metrics answers HTTP %d: of its load is known what is sent there from here, and "
                           "its memory counts as endless", self._place.name, answer.status_code)
        return read_metrics(answer.text if answer.status_code == 200 else "")

    def close(self, reason: str = "this client was closed") -> None:
        """See `MemberClient.close`: the server aborts what it has, because the connections are closed."""
        self._leave(reason)

    def _leave(self, reason: str) -> None:
        self._die(reason)

    async def closed(self) -> None:
        """See `MemberClient.closed`: until its connections are."""
        await asyncio.gather(*self._closing, *self._tasks.values(), return_exceptions=True)

    # --- how it is

    def silent_for_s(self) -> float:
        """See `WatchedEngine.silent_for_s`: since its health was good, or since it moved on, if it has requests."""
        now = time.monotonic()
        has_requests = self._streams or self.stats.num_running or self.stats.num_waiting
        return max(now - self._heard_s, now - self._moved_s if has_requests else 0.0)

    async def _watch(self) -> None:
        while self.dead_reason is None:
            self._look_now.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._look_now.wait(), LOOK_S)
            try:
                await self._look()
            except EngineDeadError as error:
                self._die(str(error))
            except httpx.TimeoutException:
                pass  # it counts as silence
            except (httpx.HTTPError, OSError) as error:
                self._die(_why(error))
            except Exception as error:  # whatever it sends: nobody may wait for a server that is not watched
                logger.exception("what %s says of itself cannot be read", self._place.name)
                self._die(f"what it sends cannot be read: {type(error).__name__}")
            if self._silence_s and time.monotonic() - self._heard_s > self._silence_s:
                self._die(f"no answer of its /health for {time.monotonic() - self._heard_s:.1f} s")
            elif self._progress_s and self.silent_for_s() > self._progress_s:
                self._die(f"its engine has made no progress for {self.silent_for_s():.1f} s")

    async def _look(self) -> None:
        await self._get("/health", self._silence_s or CONNECT_S)
        self._heard_s = time.monotonic()
        metrics = await self._metrics()
        if f"{metrics.started_unix_s:.3f}" != self.incarnation and metrics.started_unix_s:
            raise EngineDeadError("it was started again")
        self._take_metrics(metrics)
        self.on_condition()

    def _take_metrics(self, metrics: ServerMetrics) -> None:
        stats, own = metrics.stats, len(self._streams)
        counts = (stats.prompt_tokens_total, stats.generation_tokens_total, stats.num_steps)
        if counts != self._counts or not (own or stats.num_running or stats.num_waiting):
            self._counts, self._moved_s = counts, time.monotonic()
        if not stats.num_running and not stats.num_waiting:
            stats.num_running = own  # it does not say, or has just got them
        self.stats = stats

    # --- requests

    def refusal(self, requests: Sequence[Request]) -> RequestError | None:
        """See `MemberClient.refusal`."""
        return first_refusal(requests)

    def depart(self, request_id: str, offer: KVOffer) -> None:
        """See `EngineClient.depart`: its requests stay."""

    async def expect(self, request: Request, lease_s: float) -> Expected:
        """See `EngineClient.expect`: its server takes KV in a way of its own."""
        return Expected(0, reason="an OpenAI server takes no KV of ours")

    def unexpect(self, landing: int) -> None:
        """See `EngineClient.unexpect`: it makes no offers."""

    async def control(self, action: Action, **options: Any) -> Controlled:
        """See `EngineClient.control`: refused, but for the question how it is."""
        self._check_up()
        state = EngineState(num_open=len(self._streams))
        return Controlled(0, state, error=None if action == "state" else _COMMANDS, is_state=action != "state")

    async def control_or_log(self, action: Action, **options: Any) -> None:
        """See `CommandingClient.control_or_log`. A server that would compute while the others are paused or asleep is
        left; one without their adapters gets no requests for these."""
        if action in ("pause", "sleep"):
            self._die(f"the other instances have got the command {action}, and {_COMMANDS}")
            raise EngineDeadError(self.dead_reason or "")

    def _send(self, command: Command) -> None:
        if isinstance(command, Submit):
            waiting = {request.request_id for request in command.requests}
            stream = self._streams[command.requests[0].request_id]
            for request in command.requests:
                self._tasks[request.request_id] = asyncio.create_task(self._run(request, stream, waiting),
                                                                      name="openai-request")
        elif isinstance(command, Abort):
            for request_id in command.request_ids:
                self._cancel(request_id)
                if request_id in self._streams:  # its reader waits for the end
                    end = OutputDelta(request_id, [], finish_reason=FinishReason.ABORT)
                    asyncio.get_running_loop().call_soon(self._deliver, end)

    def _cancel(self, request_id: str) -> None:
        """Close the connection of a request, upon which the server aborts it."""
        if (task := self._tasks.pop(request_id, None)) is not None and task is not asyncio.current_task():
            task.cancel()
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def _run(self, request: Request, stream: Stream, waiting: set[str]) -> None:
        """Have one sequence computed. waiting: of its call, those that the server has not taken."""
        assert self.facts is not None
        reader = ChunkReader(request, self.facts.vocab_size)

        def admit() -> None:
            if request.request_id in waiting:
                waiting.remove(request.request_id)
                if not waiting:  # once a call
                    stream.admit()

        admitting: asyncio.TimerHandle | None = None
        try:
            async for delta in self._answer(request, reader):
                if delta is None:
                    admitting = asyncio.get_running_loop().call_later(ADMIT_S, admit)
                else:
                    admit()
                    self._moved_s = time.monotonic()
                    self._deliver(delta)
            if not reader.is_done:
                raise EngineDeadError("the answer ended before its end")
        except RequestError as error:
            self._fail(request, str(error), error.field or "prompt")
        except _BusyError as error:
            self._fail(request, str(error), None)
        except (EngineDeadError, httpx.HTTPError, OSError) as error:
            self._look_now.set()
            self._lose(request, _why(error))
        except Exception as error:  # a bug of ours; no reader may wait for deltas that never come
            logger.exception("reading what %s sends failed", self._place.name)
            self._lose(request, f"what it sends cannot be read: {type(error).__name__}")
        finally:
            if admitting is not None:
                admitting.cancel()
            if self._tasks.get(request.request_id) is asyncio.current_task():
                del self._tasks[request.request_id]

    async def _answer(self, request: Request, reader: ChunkReader) -> Any:
        """None once it is taken, then deltas. Raises what `ChunkReader.read` raises, `_BusyError`, httpx.HTTPError."""
        assert self._http is not None
        body = completion_body(request, self._card.names[0], self._card.max_model_len)
        if request.request_id != "try":
            body["request_id"] = request.request_id.replace("/", "-")
        headers = {} if request.traceparent is None else {"traceparent": request.traceparent}
        async with self._http.stream("POST", "/v1/completions", json=body, headers=headers) as answer:
            if answer.status_code != 200:
                raise await self._refused(answer)
            yield None
            rest, found = b"", list[bytes]()
            async for piece in answer.aiter_bytes():
                rest = data_lines(found.append, rest, piece)
                for data in found:
                    if (delta := reader.read(data)) is not None:
                        yield delta
                found.clear()
                if len(rest) > MAX_EVENT_BYTES:
                    raise EngineDeadError(f"it sends an event of more than {MAX_EVENT_BYTES} bytes")

    async def _refused(self, answer: httpx.Response) -> Exception:
        content = b""
        async for piece in answer.aiter_bytes():
            content += piece
            if len(content) > MAX_ERROR_BYTES:
                break
        status = answer.status_code
        error = error_of(_error_in(content), status)
        if status in _BUSY:
            return _BusyError(str(error))
        if status in (401, 403, 404):  # whoever is asked next gets the same answer
            self._die(str(error))
        return error

    def _fail(self, request: Request, error: str, field: str | None) -> None:
        """The server refuses a request, and with it its call. field: None: it has no room."""
        if (stream := self._streams.get(request.request_id)) is not None:
            for request_id in stream.open_ids:
                self._cancel(request_id)
            self._refuse(stream, Refused(request.request_id, error, field))

    def _lose(self, request: Request, reason: str) -> None:
        if (stream := self._streams.get(request.request_id)) is None:
            return
        for request_id in stream.open_ids:
            self._streams.pop(request_id, None)
            self._cancel(request_id)
        stream.lose(EngineDeadError(reason))

    def _die(self, reason: str) -> None:
        if self.dead_reason is not None or self.phase == "not connected":
            return
        super()._die(reason)
        self.phase = "dead"
        for request_id in list(self._tasks):
            self._cancel(request_id)
        if self._watching is not None and self._watching is not asyncio.current_task():
            self._watching.cancel()
        if self._http is not None:
            task = asyncio.create_task(self._close(self._http), name="openai-server-close")
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
            self._http = None
        self.on_lost(reason)

    async def _close(self, http: httpx.AsyncClient) -> None:
        await http.aclose()


class _BusyError(Exception):
    """The server has no room for a request."""


def _why(error: BaseException) -> str:
    if isinstance(error, httpx.ConnectError):
        return "nothing listens there, or the connection is refused"
    if isinstance(error, httpx.TimeoutException):
        return "no answer in time"
    if isinstance(error, (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError)):
        return "the connection was lost"
    return str(error) or type(error).__name__


def _error_in(content: bytes) -> Any:
    """Of the body of an answer that refuses: the API's error object, or as much text as there is."""
    with contextlib.suppress(ValueError, AttributeError):
        found = httpx.Response(200, content=content).json()
        return found.get("error") or found.get("message") or found
    return content.decode(errors="replace")[:200]


def _refused_text(path: str, answer: httpx.Response) -> str:
    error = _error_in(answer.content[:MAX_ERROR_BYTES])
    said = error.get("message") or error.get("reason") if isinstance(error, dict) else error
    return f"its {path} answers HTTP {answer.status_code}" + (f": {str(said)[:200]}" if said else "")
