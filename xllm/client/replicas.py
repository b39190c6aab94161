"""`Replicas`: several engine processes of one model that look like one engine.

A call goes to one of them, chosen by what its KV cache has of the prompt and what else it has to do
(`xllm/routing/fleet.py`). A command goes to all. One that dies costs its own requests only: the others go on, and it
comes back to where they are.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from xllm.client.engine_client import Stream
from xllm.client.merged_stats import merged_stats
from xllm.client.process import ProcessClient
from xllm.client.replica_control import ReplicaControl
from xllm.config import EngineConfig
from xllm.engine.commands import Action, CacheChanges, Controlled, Expected
from xllm.engine.facts import EngineFacts
from xllm.engine.step_log import StepReport
from xllm.engine_count import check_engines
from xllm.errors import ConfigError, EngineDeadError, RequestError
from xllm.kv_events_settings import of_rank
from xllm.kv_offer import KVOffer
from xllm.request import Request
from xllm.routing.fleet import Fleet
from xllm.routing.prompt_marks import NO_MARKS, PromptMarks, prompt_marks
from xllm.routing.routed_instance import LoadReport
from xllm.stats import EngineStats

# Without a sign of progress an engine gets no requests while others move on. Chosen: twenty busy heartbeats, and longer
# than all but the longest steps.
SILENT_S = 5.0
OnPhase = Callable[[str, float, float], None]


def open_engine(config: EngineConfig, on_phase: OnPhase, *, reports_cache: bool = False) -> ProcessClient | Replicas:
    """The engine that a server runs, or the engines; not started yet. reports_cache: a single one calls
    `on_cache_changes`; several always do. Raises ConfigError."""
    check_engines(config.device)
    if config.device.data_parallel_size == 1:
        return ProcessClient(config, on_phase=on_phase, reports_cache=reports_cache)
    return Replicas(config, on_phase)


class Replicas:
    """A `WatchedEngine` of `data_parallel_size` processes, for one event loop. Whoever watches it starts each engine
    again by its own `restart`. on_phase: called as the first engine's start-up goes on."""

    def __init__(self, config: EngineConfig, on_phase: OnPhase):
        configs = [_of_engine(config, number) for number in range(config.device.data_parallel_size)]
        self.engines = tuple(ProcessClient(one, on_phase=None if number else on_phase, name=f"engine{number}",
                                           reports_cache=True) for number, one in enumerate(configs))
        self.facts: EngineFacts | None = None
        self._control = ReplicaControl(self._labelled)
        self._control.know_adapters(config.lora.lora_modules)
        self._fleet = Fleet()
        for number, engine in enumerate(self.engines):
            engine.adapter_folders = self._control.folders  # also of those that are down while one is loaded
            engine.on_cache_changes = self._changer(number)
            engine.on_back = self._catcher_up(number)

    def _changer(self, number: int) -> Callable[[CacheChanges], None]:
        def change(changes: CacheChanges) -> None:
            if str(number) not in self._fleet.names:  # what its disk has it tells as soon as it is ready
                self._join(number)
            self._fleet.changed(str(number), changes.tier, changes.stored, changes.removed)
        return change

    def _join(self, number: int) -> None:
        """Nothing is known to be cached there."""
        facts = self.engines[number].facts
        assert facts is not None and facts.config.cache.block_size is not None, "only when it is ready"
        settings = facts.config.scheduler
        self._fleet.join(str(number), block_size=facts.config.cache.block_size, num_blocks=facts.num_blocks,
                         max_waiting=settings.max_waiting_requests,
                         max_open=settings.max_concurrent_requests or sys.maxsize)

    def _catcher_up(self, number: int) -> Callable[[], Awaitable[None]]:
        engine = self.engines[number]

        async def catch_up() -> None:
            self._join(number)
            assert self.facts is not None and engine.facts is not None
            if (what := _difference(self.facts, engine.facts)) is not None:  # the checkpoint's files have changed
                reason = f"it differs from the others in {what}"
                engine.end_process(reason)
                raise ConfigError(reason)
            await self._control.catch_up(engine)
        return catch_up

    # --- life

    def launch(self) -> None:
        """See `ProcessClient.launch`."""
        for engine in self.engines:
            engine.launch()

    async def start(self) -> EngineFacts:
        """Start the engines and wait until all are ready. Raises as `ProcessClient.start`, and ConfigError if they
        differ."""
        found = list(await asyncio.gather(*(self._start(number) for number in range(len(self.engines)))))
        for number, facts in enumerate(found):
            if (what := _difference(found[0], facts)) is not None:
                raise ConfigError(f"engine {number} differs from engine 0 in {what}")
            if str(number) not in self._fleet.names:
                self._join(number)
        self.facts = found[0]
        return self.facts

    async def _start(self, number: int) -> EngineFacts:
        try:
            return await self.engines[number].start()
        except EngineDeadError as error:
            raise EngineDeadError(f"engine {number}: {error}") from None

    async def shutdown(self) -> None:
        """See `ProcessClient.shutdown`."""
        await asyncio.gather(*(engine.shutdown() for engine in self.engines))

    def kill(self) -> None:
        """See `ProcessClient.kill`."""
        for engine in self.engines:
            engine.kill()

    # --- how they are

    def _up(self) -> dict[int, ProcessClient]:
        """The engines that take requests, by their numbers."""
        return {number: engine for number, engine in enumerate(self.engines)
                if engine.is_up and engine.restarting_after is None}

    def _labelled(self) -> dict[str, ProcessClient]:
        return {f"engine {number}": engine for number, engine in self._up().items()}

    @property
    def is_up(self) -> bool:
        """Whether requests are taken: one engine is enough."""
        return bool(self._up())

    @property
    def dead_reason(self) -> str | None:
        """Why nothing is taken any more: all engines have died."""
        reasons = [engine.dead_reason for engine in self.engines]
        return None if None in reasons else f"engine 0: {reasons[0]}"

    @property
    def restarting_after(self) -> str | None:
        """Why there is no engine, while one starts again."""
        if self.is_up:
            return None
        return next((engine.restarting_after for engine in self.engines if engine.restarting_after is not None), None)

    @property
    def phase(self) -> str:
        """Of the first engine that is not ready; "ready" once one takes requests and all have been started."""
        if self.facts is not None and self.is_up:
            return "ready"
        return next((engine.phase for engine in self.engines if engine.phase != "ready"), "ready")

    def silent_for_s(self) -> float:
        """Of the engine that answered last: as long as one moves on, requests are served."""
        return min((engine.silent_for_s() for engine in self._up().values()), default=0.0)

    @property
    def stats(self) -> EngineStats:
        """Of all engines together."""
        return merged_stats([engine.stats for engine in self.engines])

    @property
    def steps(self) -> StepReport:
        """The first engine's; each engine has its own."""
        return self.engines[0].steps

    @property
    def on_steps(self) -> Callable[[StepReport], None]:
        """Called with each report of steps, whichever engine it comes from."""
        return self.engines[0].on_steps

    @on_steps.setter
    def on_steps(self, hear: Callable[[StepReport], None]) -> None:
        for engine in self.engines:
            engine.on_steps = hear

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names that requests may ask for."""
        return self._first.adapters

    @property
    def sleep_level(self) -> int:
        """0: awake."""
        return self._first.sleep_level

    @property
    def _first(self) -> ProcessClient:
        """The first that is up; where none is, the first."""
        return next(iter(self._up().values()), self.engines[0])

    # --- requests and commands

    @property
    def request_ids(self) -> tuple[str, ...]:
        """Of the requests that have not ended."""
        return tuple(request_id for engine in self.engines for request_id in engine.request_ids)

    def submit(self, requests: Sequence[Request]) -> Stream:
        """See `EngineClient.submit`. All requests of a call go to one engine."""
        for request in requests:
            if any(engine.has(request.request_id) for engine in self.engines):
                raise RequestError(f"request_id {request.request_id!r} is in use", field="request_id")
        if requests[0].landing is not None:
            return self._submit_landing(requests)
        able = self._able(requests)
        prompts = {id(request.prompt_token_ids): request for request in reversed(requests)}  # what they share once
        marks = {request.request_id: self._marks(request) for request in prompts.values()}
        num_tokens = sum(len(request.prompt_token_ids) for request in prompts.values())
        now_s = time.monotonic()
        for number, engine in able.items():  # of what runs there all is known
            self._fleet.heard(str(number), LoadReport(num_waiting=0, num_running=0,
                                                      num_free_blocks=_num_free_blocks(engine)), now_s)
        decision = self._fleet.decide(list(marks.values()), num_tokens, len(requests), now_s,
                                      exclude={*self._fleet.names} - {*map(str, able)})
        assert decision.name is not None, "one at least is up"
        name, matched = decision.name, dict(zip(marks, decision.matched_tokens, strict=True))
        stream = self.engines[int(name)].submit(requests)
        stream.engine = int(name)

        def note(request_id: str, num_tokens: int) -> None:
            if request_id in stream.open_ids:
                self._fleet.begun(name, request_id)
            else:
                self._fleet.left(name, request_id)

        stream.listeners.append(note)
        for request in requests:
            own = marks.get(request.request_id)
            to_compute = 0 if own is None else len(request.prompt_token_ids) - matched[request.request_id]
            self._fleet.sent(name, request.request_id, to_compute, own or NO_MARKS)
        return stream

    def _submit_landing(self, requests: Sequence[Request]) -> Stream:
        """To the engine that expects their KV."""
        landing = requests[0].landing
        assert landing is not None
        number, count = landing % len(self.engines), len(self.engines)
        stream = self.engines[number].submit([
            replace(request, landing=request.landing // count if request.landing is not None
                    and request.landing % count == number else None) for request in requests])
        stream.engine = number
        return stream

    async def expect(self, request: Request, lease_s: float) -> Expected:
        """See `EngineClient.expect`: the engine that has the fewest requests expects it."""
        able = self._able([request])
        number = min(able, key=lambda number: len(self.engines[number].request_ids))
        found = await self.engines[number].expect(request, lease_s)
        return replace(found, landing=found.landing * len(self.engines) + number)

    def unexpect(self, landing: int) -> None:
        """See `EngineClient.unexpect`."""
        count = len(self.engines)
        self.engines[landing % count].unexpect(landing // count)

    def _able(self, requests: Sequence[Request]) -> dict[int, ProcessClient]:
        """The engines that a call can go to, by their numbers. Raises EngineDeadError if there is none."""
        up = self._up()
        if not up:
            raise EngineDeadError(self.dead_reason or f"it is starting again after: {self.restarting_after}")
        # One that hangs keeps what it has; until it is ended, others get what is new.
        up = {number: engine for number, engine in up.items() if engine.silent_for_s() < SILENT_S} or up
        wanted = {(name, digest) for name, digest in self._digests.items() if any(r.lora == name for r in requests)}
        # One that could not load the same adapter when it came back is passed by.
        return {number: engine for number, engine in up.items()
                if wanted <= set(zip(engine.adapters, engine.adapter_digests))} or up

    @property
    def _digests(self) -> dict[str, str]:
        """Of the adapters that are loaded, by name."""
        return dict(zip(self._first.adapters, self._first.adapter_digests, strict=True))

    @property
    def _block_size(self) -> int:
        assert self.facts is not None and self.facts.config.cache.block_size is not None, "only after the start"
        return self.facts.config.cache.block_size

    def _marks(self, request: Request) -> PromptMarks:
        assert self.facts is not None
        if not self.facts.config.cache.enable_prefix_caching:
            return NO_MARKS
        digest = self._digests[request.lora] if request.lora in self.adapters else ""
        return prompt_marks(request.prompt_token_ids, self._block_size, request.cache_salt, digest)

    def depart(self, request_id: str, offer: KVOffer) -> None:
        """See `EngineClient.depart`."""
        for engine in self.engines:
            engine.depart(request_id, offer)

    def abort(self, request_ids: Iterable[str]) -> None:
        """See `EngineClient.abort`."""
        wanted = list(request_ids)
        for engine in self.engines:
            engine.abort(wanted)

    async def control(self, action: Action, **options: Any) -> Controlled:
        """See `EngineClient.control`: all engines do it, or none. The error of one that refuses names it."""
        return await self._control.run(action, options)


def _of_engine(config: EngineConfig, number: int) -> EngineConfig:
    """Its config: a folder of its own on disk, and ports of its own for KV events."""
    cache = replace(config.cache, kv_events_config=of_rank(config.cache.kv_events_config, number))
    if cache.disk_cache_dir is not None:
        cache = replace(cache, disk_cache_dir=str(Path(cache.disk_cache_dir) / f"engine-{number}"))
    return replace(config, cache=cache)


def _num_free_blocks(engine: ProcessClient) -> int:
    """As it said last; before it has said anything, all."""
    assert engine.facts is not None
    return engine.stats.num_free_blocks if engine.stats.num_blocks else engine.facts.num_blocks


def _difference(first: EngineFacts, other: EngineFacts) -> str | None:
    """What two engines that serve as one must not differ in, and do. How much memory they have may differ."""
    for name in ("model_path", "vocab_size", "hidden_size", "eos_token_ids", "max_model_len"):
        if getattr(first, name) != getattr(other, name):
            return f"{name}: {getattr(other, name)!r} and {getattr(first, name)!r}"
    return None
