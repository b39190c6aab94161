"""`xllm serve`: one HTTP server over one engine process."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import shlex
import signal
import socket
import ssl
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn

from serving.api.app import QUIET, create_app
from serving.api.connection import connection_class
from serving.api.connections import ACCEPTED_AT_ONCE, Connections
from serving.api.handshake import with_tls
from serving.api.state import ServerState
from serving.cluster.model_fingerprint import model_fingerprint
from serving.commands.cluster_instance import ClusterInstance
from serving.commands.cluster_plan import ClusterPlan, cluster_plan
from serving.commands.signals import SECOND, EndSignals
from serving.commands.startup import LogStream, StartupView
from serving.config import ServerConfig
from serving.engine.supervisor import Supervisor
from serving.observe.call_log import CallLog
from serving.observe.log_rate import bound_logs
from serving.observe.throughput_log import ThroughputLog
from serving.observe.tracing import Tracer
from serving.security.exposure import check_exposure, check_key_files, is_local, key_ring, tls_context
from serving.security.keys import KeyRing
from xllm import logs
from xllm.client.gate_wire import ServedModel
from xllm.client.replicas import open_engine
from xllm.config import EngineConfig, ModelSettings
from xllm.engine.facts import EngineFacts
from xllm.errors import ConfigError, RequestError, XllmError
from xllm.generation_config import read_sampling_defaults
from xllm.hub import resolve_model_path
from xllm.sizes import size_text

if TYPE_CHECKING:
    from xllm.text.tokenizer import Tokenizer

logger = logging.getLogger("xllm.serve")
POLL_S = 0.05  # between looks at what is awaited while starting and draining. Chosen: hardly noticed by a person
ABORT_GRACE_S = 1.0  # for aborted requests to send their last words. Chosen: a reader that takes longer is cut off
# Connections that may wait until they are accepted. Chosen; the kernel cuts it to net.core.somaxconn (4096 by default).
KERNEL_QUEUE = 2048


def run(engine_config: EngineConfig, server_config: ServerConfig) -> int:
    """Serve until a signal comes. Returns the exit code. Raises ConfigError before anything has started."""
    logs.take_over()
    if engine_config.model.generation_config not in ("auto", "vllm"):
        read_sampling_defaults(engine_config.model.generation_config, Path())  # a wrong folder is said now, not later
    keys = key_ring(server_config.http)
    tls = tls_context(server_config.http)
    plan = cluster_plan(server_config.cluster)
    for warning in check_key_files(server_config.http):
        logger.warning("%s", warning)
    tracer = Tracer(server_config.http.otlp_traces_endpoint) if server_config.http.otlp_traces_endpoint else None
    listener = bind(server_config.http.host, server_config.http.port)
    try:
        check_exposure(listener, server_config.http, keys)
        if not is_local(listener) and not server_config.http.ssl_certfile:
            logger.warning("keys and texts cross the network in the clear: --ssl-certfile makes it HTTPS")
        return asyncio.run(_Server(engine_config, _without_keys(server_config), listener, keys, tracer, tls,
                                   plan).run())
    finally:
        listener.close()


def _without_keys(config: ServerConfig) -> ServerConfig:
    """From here on only the digests are held."""
    return dataclasses.replace(config, http=dataclasses.replace(config.http, api_key=(), admin_api_key=()))


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


class _Server:
    """The life of one server: start the engine behind an open port, serve, drain, stop."""

    def __init__(self, engine_config: EngineConfig, config: ServerConfig, listener: socket.socket, keys: KeyRing,
                 tracer: Tracer | None, tls: ssl.SSLContext | None, plan: ClusterPlan | None):
        self._config, self._tls = config, tls
        self._engine_config = engine_config
        self._listener = listener
        self._keys = keys
        self._tracer = tracer
        self._plan = plan
        self._stop = asyncio.Event()
        self._signals = EndSignals()
        self._code = 0
        is_watched = sys.stdout.isatty() and not logs.is_json()
        self._view = StartupView(sys.stdout if is_watched else LogStream(logging.getLogger("xllm.startup")))

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        self._engine = open_engine(self._engine_config, self._show_phase,
                                   reports_cache=self._plan is not None and self._plan.tells_cache)
        self._state = ServerState(self._engine, self._config, keys=self._keys, tracer=self._tracer,
                                  model_name=self._engine_config.model.model or "demo")
        self._check_adapter_names()
        for signum in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(signum, self._on_signal, signum)
        http = self._config.http
        connections = Connections(self._config.connections, self._state.closed_connections)
        if connections.max_open < self._config.connections.max_connections:
            logger.warning("at most %d connections at a time: the limit of open files (ulimit -n) allows no more",
                           connections.max_open)
        bound_logs()
        connection = connection_class(connections)
        if self._tls is not None:
            connection = with_tls(connections, self._tls, connection)
        self._http = _QuietServer(uvicorn.Config(
            CallLog(create_app(self._state), log_requests=self._config.log.enable_log_requests, quiet=QUIET),
            log_level=http.uvicorn_log_level, log_config=None, access_log=False,  # requests have lines of our own
            server_header=False, timeout_keep_alive=30, timeout_graceful_shutdown=5, lifespan="off",
            # httptools has no bound on headers. h11 takes this for a head that has not ended; `check_head` is exact.
            http=connection,  # type: ignore[arg-type]
            backlog=ACCEPTED_AT_ONCE,
            ws="none", h11_max_incomplete_event_size=2 * self._config.limits.max_header_bytes,
            proxy_headers=False))
        self._cluster: ClusterInstance | None = None
        if self._plan is not None:
            self._cluster = ClusterInstance(self._plan, self._engine, self._listener.getsockname()[:2],
                                            http.lora_folder)
            self._cluster.listen()
        self._engine.launch()
        serving = asyncio.create_task(self._serve_http())
        loading = asyncio.create_task(self._load())
        stopping = asyncio.create_task(self._stop.wait())
        sampling = asyncio.create_task(self._state.history.run(
            self._engine, lambda: self._state.callers.sample(self._state.requests.open_records())))
        reporting = asyncio.create_task(self._report_throughput())
        try:
            await asyncio.wait((stopping, serving), return_when=asyncio.FIRST_COMPLETED)
            loading.cancel()  # an engine that dies from now on stays dead
            await self._drain()
        finally:
            self._http.should_exit = True
            loading.cancel()
            stopping.cancel()
            sampling.cancel()
            reporting.cancel()
            await asyncio.gather(serving, loading, stopping, sampling, reporting, return_exceptions=True)
            if self._cluster is not None:
                await self._cluster.leave()
            await self._engine.shutdown()
            if self._tracer is not None:
                await asyncio.to_thread(self._tracer.shutdown)
        return self._code

    async def _report_throughput(self) -> None:
        if not self._config.log.disable_log_stats:
            await ThroughputLog(self._engine).run()

    async def _serve_http(self) -> None:
        serving = asyncio.create_task(self._http.serve(sockets=[self._listener]))
        while not self._http.started and not serving.done():
            await asyncio.sleep(POLL_S)
        # asyncio takes one number for what it accepts in a turn, which must be few, and for what the kernel queues.
        with contextlib.suppress(OSError):
            self._listener.listen(KERNEL_QUEUE)
        await serving

    def _check_adapter_names(self) -> None:
        """Raise ConfigError if an adapter would hide behind the model."""
        for module in self._engine_config.lora.lora_modules:
            try:
                self._state.check_adapter_name(module.partition("=")[0], "lora_modules")
            except RequestError as error:
                raise ConfigError(str(error)) from None

    async def _load(self) -> None:
        try:
            # The tokenizer loads beside the weights; what is wrong with it ends the start at once.
            _, (self._state.tokenizer, self._state.sampling_defaults), _ = await asyncio.gather(
                self._start_engine(), asyncio.to_thread(_load_front, self._engine_config.model), self._find_store())
            if self._cluster is not None:
                fingerprint = await asyncio.to_thread(model_fingerprint, self._engine_config.model, self._state.facts)
                await self._cluster.join(ServedModel(self._state.served_names, fingerprint))
        except Exception as error:  # whatever it was: a server that loads for ever would be worse
            self._view.interrupt()
            logger.error("the server does not start: %s", str(error) or type(error).__name__,
                         exc_info=not isinstance(error, XllmError))
            self._code = 1
            self._stop.set()
            return
        self._state.loaded = True
        if self._tracer is not None:
            self._tracer.model = self._state.served_names[0]
        self._view.ready()
        self._announce()
        engines = self._engine.engines
        self._state.supervisors = [
            Supervisor(engine, self._config.resilience, "the engine" if len(engines) == 1 else f"engine {number}")
            for number, engine in enumerate(engines)]
        await asyncio.gather(*(supervisor.run() for supervisor in self._state.supervisors))

    async def _find_store(self) -> None:
        if self._cluster is not None:
            await self._cluster.find_store()

    async def _start_engine(self) -> None:
        await self._engine.start()
        if not self._engine_config.model.skip_tokenizer_init:
            self._view.phase("tokenizer", 0.0)

    def _show_phase(self, name: str, share: float, seconds: float) -> None:
        if self._stop.is_set():
            return  # what was said last is why it ends
        if name != "ready":  # the engine is; the tokenizer may not be
            self._view.phase(name, share)
        elif self._state.loaded:  # the engine was started again
            self._view.ready()

    def _announce(self) -> None:
        facts, http = self._state.facts, self._config.http
        host, port = self._listener.getsockname()[:2]
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
        scheme = "https" if http.ssl_certfile else "http"
        engines = len(self._engine.engines)
        each = f" in each of {engines} engines" if engines > 1 else ""
        blocks = f"{facts.num_blocks} KV blocks of {facts.config.cache.block_size}{each}"
        self._say(f"xLLM serves {self._state.served_names[0]} on {scheme}://{host}:{port} (longest sequence "
                  f"{facts.max_model_len} tokens, {blocks})")
        self._say(_placement_text(facts))
        if self._cluster is not None:
            self._say(self._cluster.announcement)
        if facts.placement.advice:
            self._say(f"hint: {facts.placement.advice} (docs/performance.md)")
        key = " -H 'Authorization: Bearer YOUR_KEY'" if self._keys.has_user_keys else ""
        body = json.dumps({"model": self._state.served_names[0], "max_tokens": 32,
                           **self._example_prompt()})
        path = "chat/completions" if "messages" in body else "completions"
        self._say(f"console: {scheme}://{host}:{port}/")
        self._say(f"try it:\n  curl {scheme}://{host}:{port}/v1/{path} -H 'Content-Type: application/json'{key} "
                  f"-d {shlex.quote(body)}")

    def _say(self, text: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # whoever read our output has gone; serving goes on
            # With the line break in one write: another process writes to the same file.
            print((logs.as_json(logger, text) if logs.is_json() else text) + "\n", end="", flush=True)

    def _example_prompt(self) -> dict[str, object]:
        tokenizer = self._state.tokenizer
        if tokenizer is None:
            return {"prompt": [1, 2, 3]}
        if not tokenizer.has_chat_template:
            return {"prompt": "Hello"}
        return {"messages": [{"role": "user", "content": "Hello"}]}

    def _on_signal(self, signum: int) -> None:
        if self._signals.note(signum) is SECOND:
            logger.warning("second signal: stopping at once")
            self._engine.kill()
            logging.shutdown()
            os._exit(128 + signum)
        self._state.draining = True
        self._stop.set()

    async def _drain(self) -> None:
        """Let open requests finish, up to the time limit; then abort them, so that each gets its answer."""
        self._state.draining = True
        if self._cluster is not None:
            self._cluster.drain()
        if self._num_open and self._engine.dead_reason is None:
            logger.info("draining %d open requests (at most %g s; a second signal stops at once)", self._num_open,
                        self._config.http.drain_timeout)
            if not await self._all_closed(self._config.http.drain_timeout):
                logger.warning("drain timeout: aborting %d requests", self._num_open)
                self._engine.abort(self._engine.request_ids)
                await self._all_closed(ABORT_GRACE_S)

    @property
    def _num_open(self) -> int:
        """HTTP calls that are generating, and requests of the cluster."""
        return self._state.num_open + (0 if self._cluster is None else self._cluster.num_open)

    async def _all_closed(self, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        while self._num_open and self._engine.dead_reason is None:
            if time.monotonic() >= deadline:
                return False
            await asyncio.sleep(POLL_S)
        return True


def _placement_text(facts: EngineFacts) -> str:
    """One line: device, threads, types, quantisation, memory."""
    at, config = facts.placement, facts.config
    threads = f", num_threads {at.num_threads}" if at.num_threads else ""
    device = config.device
    ranks = f", {device.worker_ranks} ranks" if device.worker_ranks > 1 else ""
    if device.tensor_parallel_size > 1:
        ranks = f", tensor parallel over {device.tensor_parallel_size} ranks (memory is a rank's)"
    if config.nodes.is_several:
        ranks += f" on {config.nodes.nnodes} nodes"
    weights = size_text(at.weights_bytes) if at.weights_bytes else "random"
    quantization = config.model.quantization or "none"
    return (f"device {at.device}{threads}{ranks}; dtype {at.dtype}, quantization {quantization}; weights {weights}, "
            f"KV cache up to {size_text(at.kv_bytes)} in {at.kv_dtype}, {at.kv_token_bytes} bytes a token")


def _load_front(model: ModelSettings) -> tuple[Tokenizer | None, dict[str, object]]:
    """All that this process reads of the checkpoint. Raises ModelError or ConfigError."""
    from xllm.inputs import model_tokenizer  # the import takes its time, too

    tokenizer = model_tokenizer(model)
    return tokenizer, read_sampling_defaults(model.generation_config, resolve_model_path(model.model, model.revision))


