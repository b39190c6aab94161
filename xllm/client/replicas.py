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

from xllm.client.distinct_prompts import distinct_prompts
from xllm.client.engine_client import Stream
from xllm.client.merged_stats import merged_stats
from xllm.client.process import ProcessClient
from xllm.client.replica_control import ReplicaControl
from xllm.client.replica_landings import ReplicaLanding, ReplicaLandings
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
from xllm.routing.fleet_snapshot import Decision
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
        self._fleet, self._landings = Fleet(), ReplicaLandings()
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
        self._landings.forget(number)
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
        able, prompts = self._able(requests), distinct_prompts(requests)
        marks = {request.request_id: self._marks(request) for request in prompts}
        found = [self._landings.engine_of(request.landing) for request in requests]
        if (place := next((number for number in found if number in able), None)) is not None:
            name = str(place)  # most of their KV is there, or about to be
            matched = {request.request_id: len(request.prompt_token_ids) for request, number in
                       zip(requests, found, strict=True) if number == place}
        else:
            decision = self._decide(able, list(marks.values()), sum(len(one.prompt_token_ids) for one in prompts),
                                    len(requests))
            assert decision.name is not None, "one at least is up"
            name, matched = decision.name, dict(zip(marks, decision.matched_tokens, strict=True))
        stream = self.engines[int(name)].submit(self._landed(requests, int(name)))
        stream.engine = int(name)

        def note(request_id: str, num_tokens: int) -> None:
            if request_id in stream.open_ids:
                self._fleet.begun(name, request_id)
            else:
                self._fleet.left(name, request_id)

        stream.listeners.append(note)
        for request in requests:
            own = marks.get(request.request_id)
            to_compute = 0 if own is None else len(request.prompt_token_ids) - matched.get(request.request_id, 0)
            self._fleet.sent(name, request.request_id, to_compute, own or NO_MARKS)
        return stream

    def _decide(self, able: dict[int, ProcessClient], marks: Sequence[PromptMarks], num_tokens: int,
                num_requests: int) -> Decision:
        now_s = time.monotonic()
        for over in self._landings.take_over(now_s):
            self._fleet.left(str(over.engine), over.request_id)
        for number, engine in able.items():  # of what runs there all is known
            self._fleet.heard(str(number), LoadReport(num_waiting=0, num_running=0,
                                                      num_free_blocks=_num_free_blocks(engine)), now_s)
        return self._fleet.decide(marks, num_tokens, num_requests, now_s,
                                  exclude={*self._fleet.names} - {*map(str, able)})

    def _landed(self, requests: Sequence[Request], number: int) -> list[Request]:
        """As an engine gets them, with its own landings. What others expect for them is taken back."""
        request_ids = {request.request_id for request in requests}
        found = {request.landing: self._landings.take(request.landing) for request in requests}
        for landing in filter(None, found.values()):
            if landing.engine != number:
                self.engines[landing.engine].unexpect(landing.landing)
            if landing.engine != number or landing.request_id not in request_ids:  # else it is sent now
                self._fleet.left(str(landing.engine), landing.request_id)
        own = {key: landing.landing for key, landing in found.items()
               if landing is not None and landing.engine == number}
        return [request if request.landing is None else replace(request, landing=own.get(request.landing))
                for request in requests]

    async def expect(self, request: Request, lease_s: float) -> Expected:
        """See `EngineClient.expect`: the engine that the request would be sent to expects it, and counts it from now
        on."""
        num_tokens = len(request.prompt_token_ids) + len(request.generated_token_ids)
        decision = self._decide(self._able([request]), [self._marks(request)], num_tokens, 1)
        assert decision.name is not None, "one at least is up"
        name, until_s = decision.name, time.monotonic() + lease_s
        self._fleet.expect(name, request.request_id, num_tokens)
        is_offered = False
        try:
            found = await self.engines[int(name)].expect(request, lease_s)
            is_offered = found.offer is not None
        finally:
            if not is_offered:
                self._fleet.left(name, request.request_id)
        if not is_offered:
            return found
        landing = ReplicaLanding(int(name), found.landing, request.request_id, until_s)
        return replace(found, landing=self._landings.add(landing))

    def unexpect(self, landing: int) -> None:
        """See `EngineClient.unexpect`."""
        if (found := self._landings.take(landing)) is not None:
            self._fleet.left(str(found.engine), found.request_id)
            self.engines[found.engine].unexpect(found.landing)

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
