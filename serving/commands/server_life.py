"""`ServerLife`: the life of one HTTP server, whatever engine it is for: an open port from the beginning, serve, drain,
stop."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import json
import logging
import os
import shlex
import signal
import socket
import ssl
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import uvicorn

from serving.api.app import QUIET, create_app
from serving.api.connection import connection_class
from serving.api.connections import ACCEPTED_AT_ONCE, Connections
from serving.api.handshake import with_tls
from serving.api.state import ServerState
from serving.commands.signals import SECOND, EndSignals
from serving.config import HttpSettings, ServerConfig
from serving.observe.call_log import CallLog
from serving.observe.log_rate import bound_logs
from serving.observe.throughput_log import ThroughputLog
from serving.observe.tracing import Tracer
from serving.security.exposure import check_exposure, check_key_files, is_local, key_ring, tls_context
from serving.security.keys import KeyRing
from xllm import logs
from xllm.client.engine_client import WatchedEngine
from xllm.errors import ConfigError

logger = logging.getLogger("xllm.serve")
POLL_S = 0.05  # between looks at what is awaited while starting and draining. Chosen: hardly noticed by a person
ABORT_GRACE_S = 1.0  # for aborted requests to send their last words. Chosen: a reader that takes longer is cut off
# Connections that may wait until they are accepted. Chosen; the kernel cuts it to net.core.somaxconn (4096 by default).
KERNEL_QUEUE = 2048
# Before a garbage collection, in place of Python's 700: calls that have ended leave it nothing, so that it would walk
# those that are open again and again. Measured with 64 open: 3 % of a master's time. Chosen: a millisecond's walk.
YOUNG_OBJECTS = 10_000


@dataclass(frozen=True, slots=True)
class FrontDoor:
    """Where a server listens, and who may come in. listener: bound, and not yet listening."""

    listener: socket.socket
    keys: KeyRing
    tls: ssl.SSLContext | None
    tracer: Tracer | None

    @property
    def url(self) -> str:
        """For somebody on this machine."""
        host, port = self.listener.getsockname()[:2]
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
        return f"{'https' if self.tls is not None else 'http'}://{host}:{port}"


@contextlib.contextmanager
def front_door(http: HttpSettings) -> Iterator[FrontDoor]:
    """A context with the door; it is closed behind it. Raises ConfigError."""
    keys, tls = key_ring(http), tls_context(http)
    for warning in check_key_files(http):
        logger.warning("%s", warning)
    tracer = Tracer(http.otlp_traces_endpoint) if http.otlp_traces_endpoint else None
    listener = bind(http.host, http.port)
    try:
        check_exposure(listener, http, keys)
        if not is_local(listener) and tls is None:
            logger.warning("keys and texts cross the network in the clear: --ssl-certfile makes it HTTPS")
        yield FrontDoor(listener, keys, tls, tracer)
    finally:
        listener.close()


def bind(host: str, port: int) -> socket.socket:
    """A bound socket. Raises ConfigError that says what is in the way."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except socket.gaierror as error:
        raise ConfigError(f"host {host!r} cannot be resolved: {error.strerror}") from None
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}; is another server running there? "
                          "(--port chooses another one, --port 0 any free one)") from None
    return listener


class _QuietServer(uvicorn.Server):
    """uvicorn without its signal handlers: ours drain first."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class ServerLife(ABC):
    """`run` it once. What is served is the subclass's: it makes the engine's client and looks after it."""

    def __init__(self, config: ServerConfig, door: FrontDoor):
        # From here on only the digests of keys are held.
        http = dataclasses.replace(config.http, api_key=(), admin_api_key=())
        self._config, self._door = dataclasses.replace(config, http=http), door
        self._stop = asyncio.Event()
        self._signals = EndSignals()
        self._code = 0

    # --- the subclass's

    @abstractmethod
    def _make_state(self) -> ServerState:
        """With the engine's client; within the event loop. Raises ConfigError."""

    @abstractmethod
    async def _look_after(self) -> None:
        """Bring what is served up, set `loaded` once it is, and look after it until this is cancelled. `_fail` ends the
        server."""

    @abstractmethod
    async def _shut_down(self) -> None:
        """End what is served; there are no more calls."""

    @abstractmethod
    def _kill(self) -> None:
        """End what would outlive this process, at once."""

    def _begin_draining(self) -> None:
        """There will be no more calls; those that are open go on."""
        return

    @property
    def _num_open(self) -> int:
        """What is waited for when the server ends: HTTP calls that are generating."""
        return self._state.num_open_in_all

    # --- its life

    @property
    def _engine(self) -> WatchedEngine:
        return self._state.engine

    async def run(self) -> int:
        """Serve until a signal comes or `_fail` was called. Returns the exit code."""
        loop = asyncio.get_running_loop()
        self._state = self._make_state()
        for signum in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(signum, self._on_signal, signum)
        self._http = self._make_http()
        serving = asyncio.create_task(self._serve_http())
        looking = asyncio.create_task(self._look_after())
        stopping = asyncio.create_task(self._stop.wait())
        sampling = asyncio.create_task(self._state.history.run(
            self._engine, lambda: self._state.callers.sample(self._state.requests.open_records())))
        reporting = asyncio.create_task(self._report_throughput())
        try:
            await asyncio.wait((stopping, serving), return_when=asyncio.FIRST_COMPLETED)
            looking.cancel()  # an engine that dies from now on stays dead
            await self._drain()
        finally:
            self._http.should_exit = True
            looking.cancel()
            stopping.cancel()
            sampling.cancel()
            reporting.cancel()
            await asyncio.gather(serving, looking, stopping, sampling, reporting, return_exceptions=True)
            await self._shut_down()
            if self._door.tracer is not None:
                await asyncio.to_thread(self._door.tracer.shutdown)
        return self._code

    def _make_http(self) -> _QuietServer:
        connections = Connections(self._config.connections, self._state.closed_connections)
        if connections.max_open < self._config.connections.max_connections:
            logger.warning("at most %d connections at a time: the limit of open files (ulimit -n) allows no more",
                           connections.max_open)
        bound_logs()
        connection = connection_class(connections, 2 * self._config.limits.max_header_bytes)  # `check_head` is exact
        if self._door.tls is not None:
            connection = with_tls(connections, self._door.tls, connection)
        return _QuietServer(uvicorn.Config(
            CallLog(create_app(self._state), log_requests=self._config.log.enable_log_requests, quiet=QUIET),
            log_level=self._config.http.uvicorn_log_level, log_config=None,
            access_log=False,  # requests have lines of our own
            server_header=False, timeout_keep_alive=30, timeout_graceful_shutdown=5, lifespan="off",
            http=connection,  # type: ignore[arg-type]
            backlog=ACCEPTED_AT_ONCE,
            ws="none", proxy_headers=False))

    async def _report_throughput(self) -> None:
        if not self._config.log.disable_log_stats:
            await ThroughputLog(self._engine).run()

    async def _serve_http(self) -> None:
        serving = asyncio.create_task(self._http.serve(sockets=[self._door.listener]))
        while not self._http.started and not serving.done():
            await asyncio.sleep(POLL_S)
        # asyncio takes one number for what it accepts in a turn, which must be few, and for what the kernel queues.
        with contextlib.suppress(OSError):
            self._door.listener.listen(KERNEL_QUEUE)
        await serving

    def _note_loaded(self) -> None:
        """Requests are taken from now on."""
        # Modules and tokenizers stay: no garbage collection need walk them, for a tenth of a second each time.
        gc.collect()
        gc.freeze()
        gc.set_threshold(YOUNG_OBJECTS, *gc.get_threshold()[1:])
        self._state.loaded = True

    def _fail(self) -> None:
        """End the server; why has been said."""
        self._code = 1
        self._stop.set()

    def _say_how_to_call(self) -> None:
        url = self._door.url
        key = " -H 'Authorization: Bearer YOUR_KEY'" if self._door.keys.has_user_keys else ""
        body = json.dumps({"model": self._state.served_names[0], "max_tokens": 32,
                           **self._example_prompt()})
        path = "chat/completions" if "messages" in body else "completions"
        self._say(f"console: {url}/")
        self._say(f"try it:\n  curl {url}/v1/{path} -H 'Content-Type: application/json'{key} "
                  f"-d {shlex.quote(body)}")

    def _example_prompt(self) -> dict[str, object]:
        tokenizer = self._state.tokenizer
        if tokenizer is None:
            return {"prompt": [1, 2, 3]}
        if not tokenizer.has_chat_template:
            return {"prompt": "Hello"}
        return {"messages": [{"role": "user", "content": "Hello"}]}

    def _say(self, text: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # whoever read our output has gone; serving goes on
            # With the line break in one write: another process writes to the same file.
            print((logs.as_json(logger, text) if logs.is_json() else text) + "\n", end="", flush=True)

    def _on_signal(self, signum: int) -> None:
        if self._signals.note(signum) is SECOND:
            logger.warning("second signal: stopping at once")
            self._kill()
            logging.shutdown()
            os._exit(128 + signum)
        self._note_draining()
        self._stop.set()

    def _note_draining(self) -> None:
        for state in self._state.states:
            state.draining = True

    async def _drain(self) -> None:
        """Let open requests finish, up to the time limit; then abort them, so that each gets its answer."""
        self._note_draining()
        self._begin_draining()
        if self._num_open and self._engine.dead_reason is None:
            logger.info("draining %d open requests (at most %g s; a second signal stops at once)", self._num_open,
                        self._config.http.drain_timeout)
            if not await self._all_closed(self._config.http.drain_timeout):
                logger.warning("drain timeout: aborting %d requests", self._num_open)
                for state in self._state.states:
                    state.engine.abort(state.engine.request_ids)
                await self._all_closed(ABORT_GRACE_S)

    async def _all_closed(self, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        while self._num_open and self._engine.dead_reason is None:
            if time.monotonic() >= deadline:
                return False
            await asyncio.sleep(POLL_S)
        return True
