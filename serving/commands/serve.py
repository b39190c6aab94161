"""`xllm serve`: one HTTP server over one engine process."""

from __future__ import annotations

import asyncio
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from serving.api.state import ServerState
from serving.cluster.model_fingerprint import model_fingerprint
from serving.commands.cluster_instance import ClusterInstance
from serving.commands.cluster_plan import ClusterPlan, cluster_plan
from serving.commands.gated_calls import GatedCalls
from serving.commands.server_life import FrontDoor, ServerLife, front_door
from serving.commands.startup import LogStream, StartupView
from serving.commands.window_host import with_window_host
from serving.config import ServerConfig
from serving.engine.supervisor import Supervisor
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


def run(engine_config: EngineConfig, server_config: ServerConfig) -> int:
    """Serve until a signal comes. Returns the exit code. Raises ConfigError before anything has started."""
    logs.take_over()
    if engine_config.model.generation_config not in ("auto", "vllm"):
        read_sampling_defaults(engine_config.model.generation_config, Path())  # a wrong folder is said now, not later
    plan = cluster_plan(server_config.cluster)
    engine_config = with_window_host(engine_config, server_config.cluster, plan)
    with front_door(server_config.http) as door:
        return asyncio.run(_Server(engine_config, server_config, door, plan).run())


class _Server(ServerLife):
    """A server and its engine: start the engine behind an open port, and again when it dies."""

    def __init__(self, engine_config: EngineConfig, config: ServerConfig, door: FrontDoor, plan: ClusterPlan | None):
        super().__init__(config, door)
        self._engine_config = engine_config
        self._plan = plan
        is_watched = sys.stdout.isatty() and not logs.is_json()
        self._view = StartupView(sys.stdout if is_watched else LogStream(logging.getLogger("xllm.startup")))

    def _make_state(self) -> ServerState:
        self._own = open_engine(self._engine_config, self._show_phase,
                                reports_cache=self._plan is not None and self._plan.tells_cache)
        state = ServerState(self._own, self._config, keys=self._door.keys, tracer=self._door.tracer,
                            model_name=self._engine_config.model.model or "demo")
        _check_adapter_names(state, self._engine_config)
        self._cluster: ClusterInstance | None = None
        if self._plan is not None:
            calls = GatedCalls(self._door.tracer, log_requests=self._config.log.enable_log_requests)
            self._cluster = ClusterInstance(self._plan, self._own, self._door.listener.getsockname()[:2],
                                            self._config.http.lora_folder, calls)
            self._cluster.listen()
        return state

    async def _shut_down(self) -> None:
        if self._cluster is not None:
            await self._cluster.leave()
        await self._own.shutdown()

    def _kill(self) -> None:
        self._own.kill()

    def _begin_draining(self) -> None:
        if self._cluster is not None:
            self._cluster.drain()

    @property
    def _num_open(self) -> int:
        """HTTP calls that are generating, and requests of the cluster."""
        return self._state.num_open + (0 if self._cluster is None else self._cluster.num_open)

    async def _look_after(self) -> None:
        try:
            self._own.launch()
            # The tokenizer loads beside the weights; what is wrong with it ends the start at once.
            _, (self._state.tokenizer, self._state.sampling_defaults), _ = await asyncio.gather(
                self._start_engine(), asyncio.to_thread(load_front, self._engine_config.model), self._find_store())
            if self._cluster is not None:
                fingerprint = await asyncio.to_thread(model_fingerprint, self._engine_config.model, self._state.facts)
                await self._cluster.join(ServedModel(self._state.served_names, fingerprint))
        except Exception as error:  # whatever it was: a server that loads for ever would be worse
            self._view.interrupt()
            logger.error("the server does not start: %s", str(error) or type(error).__name__,
                         exc_info=not isinstance(error, XllmError))
            self._fail()
            return
        self._note_loaded()
        self._view.ready()
        self._announce()
        engines = self._own.engines
        self._state.supervisors = [
            Supervisor(engine, self._config.resilience, "the engine" if len(engines) == 1 else f"engine {number}")
            for number, engine in enumerate(engines)]
        await asyncio.gather(*(supervisor.run() for supervisor in self._state.supervisors))

    async def _find_store(self) -> None:
        if self._cluster is not None:
            await self._cluster.find_store()

    async def _start_engine(self) -> None:
        await self._own.start()
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
        facts = self._state.facts
        engines = len(self._own.engines)
        each = f" in each of {engines} engines" if engines > 1 else ""
        blocks = f"{facts.num_blocks} KV blocks of {facts.config.cache.block_size}{each}"
        self._say(f"xLLM serves {self._state.served_names[0]} on {self._door.url} (longest sequence "
                  f"{facts.max_model_len} tokens, {blocks})")
        self._say(_placement_text(facts))
        if self._cluster is not None:
            self._say(self._cluster.announcement)
        if facts.placement.advice:
            self._say(f"hint: {facts.placement.advice} (docs/performance.md)")
        self._say_how_to_call()


def _check_adapter_names(state: ServerState, config: EngineConfig) -> None:
    """Raise ConfigError if an adapter would hide behind the model."""
    for module in config.lora.lora_modules:
        try:
            state.check_adapter_name(module.partition("=")[0], "lora_modules")
        except RequestError as error:
            raise ConfigError(str(error)) from None


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


def load_front(model: ModelSettings) -> tuple[Tokenizer | None, dict[str, object]]:
    """All that this process reads of the checkpoint. Raises ModelError or ConfigError."""
    from xllm.inputs import model_tokenizer  # the import takes its time, too

    tokenizer = model_tokenizer(model)
    return tokenizer, read_sampling_defaults(model.generation_config, resolve_model_path(model.model, model.revision))
