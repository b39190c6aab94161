"""`EngineCore`: takes requests in, passes them through the gates to the scheduler, runs steps, and returns output
deltas.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from xllm.config import EngineConfig
from xllm.cost.cost_file import CostOrigin, read_cost_file
from xllm.engine.adapter_names import AdapterNames, OnDone
from xllm.engine.cache_watch import CacheWatch, open_publisher
from xllm.engine.collect_stats import collect_stats
from xllm.engine.commands import FLUSH_S
from xllm.engine.control import EngineControl
from xllm.engine.cost_origin import origin_of
from xllm.engine.facts import EngineFacts
from xllm.engine.gates import Gate, PauseGate
from xllm.engine.grammars import GrammarGate
from xllm.engine.landings import LandingGate
from xllm.engine.step_log import StepTiming
from xllm.engine.step_loop import StepLoop
from xllm.engine.tiering import attach_tiers
from xllm.errors import EngineStateError, RequestError
from xllm.kv import failpoints
from xllm.kv.block import block_digests
from xllm.kv_offer import KVOffer
from xllm.progress import Progress
from xllm.request import OutputDelta, Request, SamplingParams
from xllm.scheduler.scheduler import Scheduler
from xllm.stats import EngineStats
from xllm.token_ids import are_within
from xllm.worker.link import WorkerLink
from xllm.worker.messages import Loaded

logger = logging.getLogger(__name__)
# How long a step waits for a grammar if nothing else can be done. Chosen: the caller is asked for new commands that
# often.
MAX_GRAMMAR_WAIT_S = 0.05
# How soon an adapter that has been read is noticed by an idle engine. Chosen: reading one takes longer.
READING_POLL_S = 0.02


class EngineCore:
    """A loaded model and its step loop. Single-threaded: one thread adds, aborts and steps.

    Raises ConfigError, ModelError or DeviceError while loading. `progress(phase, share)` is called
    as loading goes on.
    """

    def __init__(self, config: EngineConfig, *, progress: Progress | None = None):
        report = progress or (lambda phase, share: None)
        path = config.scheduler.cost_profile
        measured = read_cost_file(Path(path)) if path else None  # what is wrong with it is said before loading
        report("import", 0.0)
        from xllm.worker.open import open_link  # imports torch

        self.link: WorkerLink = open_link(config)  # leaves nothing behind if it fails
        try:
            self._build(self.link.load(config, report))
            if path and measured:
                measured.origin.check(self.origin, Path(path))
                self.scheduler.cost.start(measured.profile)
            self._publisher = open_publisher(self.config.cache)
            if self._publisher is not None:
                self.cache_watch.listen(self._publisher.put)
        except BaseException:
            self.link.close()
            raise

    def _build(self, loaded: Loaded) -> None:
        self._loaded, self.config, self.num_blocks = loaded, loaded.config, loaded.num_blocks
        self._checked = SamplingParams()  # the last whose token ids were found to be in the vocabulary
        self.loop = StepLoop(Scheduler(self.config, num_blocks=self.num_blocks,
                                       num_reserved_blocks=loaded.num_reserved_blocks), self.link)
        pause = PauseGate(self.scheduler.check_room)
        grammars = GrammarGate(self.link, has_tokenizer=not self.config.model.skip_tokenizer_init)
        self.control = EngineControl(self.loop, self.link, pause, abort_all=self.abort_all, has_work=self._is_busy)
        self.adapters = AdapterNames(self.config.lora, self.link, is_used=self._uses_adapter)
        cache = self.config.cache
        if loaded.tiers is not None:
            attach_tiers(self.scheduler, self.link, self.config, loaded.tiers)
        promotions = self.scheduler.promotions
        self._gates: tuple[Gate, ...] = (pause, grammars, LandingGate(promotions.lander, promotions))
        self.cache_watch = CacheWatch(self.scheduler.kv, with_tokens=cache.kv_events_token_ids)

    @property
    def scheduler(self) -> Scheduler:
        return self.loop.scheduler

    @property
    def origin(self) -> CostOrigin:
        """What the costs that this engine measures hold for."""
        return origin_of(self._loaded)

    @property
    def facts(self) -> EngineFacts:
        """What clients need to know of the engine; `adapters` are those loaded now."""
        loaded = self._loaded
        return EngineFacts(config=loaded.config, model_path=loaded.model_path, vocab_size=loaded.vocab_size,
                           hidden_size=loaded.hidden_size, eos_token_ids=loaded.eos_token_ids,
                           num_blocks=loaded.num_blocks, adapters=self.adapters.names,
                           adapter_digests=self.adapters.digests, placement=loaded.placement)

    # --- requests

    def add(self, request: Request) -> None:
        """Queue a request. Raises RequestError; nothing is queued then."""
        if not request.sampling.shares_collections(self._checked):  # once for all sequences of a call
            request.sampling.check_vocabulary(self._loaded.vocab_size)
            self._checked = request.sampling
        self._check_ids(request)
        if request.pooling is None and not self._loaded.generates:
            raise RequestError("the checkpoint has no lm_head: it makes embeddings and no tokens", field="model")
        if request.pooling is not None:
            request = replace(request, pooling=request.pooling.resolve(self._loaded.pooling))
            if request.sampling.max_tokens != 1:
                raise RequestError("a request for an embedding has max_tokens 1", field="max_tokens")
        if request.offer is not None and self.scheduler.departures.outbox is None:
            raise RequestError("this engine sends no KV: it runs without enable_disagg_pd", field="offer")
        if request.lora:
            request = self.adapters.bind(request)
        if failpoints.armed is not None:
            failpoints.hit("engine.add")
        self._pass_on(request, self._gates)

    def _check_ids(self, request: Request) -> None:
        """Raise RequestError for token ids for which a device would read beyond its table."""
        last = self._loaded.vocab_size - 1
        if not are_within(request.prompt_token_ids, self._loaded.vocab_size):
            raise RequestError(f"prompt: token ids must be in 0 to {last}", field="prompt")
        if not are_within(request.generated_token_ids, self._loaded.vocab_size):
            raise RequestError(f"generated_token_ids must be in 0 to {last}", field="generated_token_ids")

    def expect(self, request: Request, lease_s: float) -> KVOffer | str:
        """Make room for the KV of a request that another instance computes, and keep it for `lease_s`; returns where
        the KV is to be sent, or why that is of no use. The request is submitted later, with the offer's number as its
        `landing`."""
        if (lander := self.scheduler.promotions.lander) is None:
            return "this engine takes no KV: it runs without enable_disagg_pd"
        try:
            self._check_ids(request)
            salt = self.adapters.bind(request).cache_salt if request.lora else request.cache_salt
        except RequestError as error:
            return str(error)
        token_ids = np.array([*request.prompt_token_ids, *request.generated_token_ids], dtype=np.int32)
        assert self.config.cache.block_size is not None, "it is loaded"
        digests = block_digests(token_ids, self.config.cache.block_size, salt)
        return lander.expect(digests, lease_s, self.scheduler.promotions.now_s)

    def unexpect(self, landing: int) -> None:
        """See `commands.Unexpect`."""
        if (lander := self.scheduler.promotions.lander) is not None:
            lander.revoke(landing)

    def depart(self, request_id: str, offer: KVOffer) -> None:
        """See `commands.Depart`. A request that waits at a gate stays."""
        if self.scheduler.departures.outbox is not None:
            self.scheduler.depart(request_id, offer)

    def take_staying(self) -> list[str]:
        """The ids of requests that were to depart and stay, since their KV cannot be sent; since the last call."""
        return self.scheduler.departures.take_kept()

    def _pass_on(self, request: Request, gates: Sequence[Gate]) -> None:
        """Give the request to the first gate that keeps it, else to the scheduler. Raises RequestError."""
        if not any(gate.hold(request) for gate in gates):
            self.scheduler.add(request)

    def abort(self, request_id: str) -> None:
        """End a request; its terminal output comes from the next `step`. Unknown ids are ignored."""
        if not any(gate.abort(request_id) for gate in self._gates):
            self.scheduler.abort(request_id)

    def abort_all(self) -> None:
        """End every open request."""
        for request in self._open_requests():
            self.abort(request.request_id)

    @property
    def num_open(self) -> int:
        """Requests that have not ended, at the gates and in the scheduler."""
        return len(self._open_requests())

    def _open_requests(self) -> list[Request]:
        held = [request for gate in self._gates for request in gate.requests]
        return [*held, *self.scheduler.requests]

    def _uses_adapter(self, name: str) -> bool:
        return any(request.lora == name for request in self._open_requests())

    def take_step(self) -> StepTiming | None:
        """The timing of the step that ended last, once; else None."""
        step, self.loop.finished = self.loop.finished, None
        return step

    def take_admissions(self) -> list[tuple[str, float]]:
        """(request id, `time.monotonic()`) of the requests that were admitted for the first time since the last call.
        They are recorded from the first call on."""
        return self.scheduler.take_admissions()

    # --- turns

    def has_work(self) -> bool:
        """Whether `step` has anything to do or to return."""
        return self.loop.has_work() or any(gate.has_work for gate in self._gates)

    def step(self) -> list[OutputDelta]:
        """Run one turn of the step loop; returns the outputs of all requests that changed, also of those that ended at
        a gate."""
        outputs = self._turn()
        self.cache_watch.pass_on()
        return outputs

    def _turn(self) -> list[OutputDelta]:
        ended = self._pass_gates()
        if ended and not self.loop.has_work():
            return ended
        if not self.loop.has_work():
            self.link.wait(MAX_GRAMMAR_WAIT_S)
            return self._pass_gates()
        outputs = self.loop.step()
        return ended + outputs if ended else outputs

    def _pass_gates(self) -> list[OutputDelta]:
        """Move requests on that need not wait at a gate any longer; returns the outputs of those that ended there."""
        self._hear()
        ended: list[OutputDelta] = []
        for index, gate in enumerate(self._gates):
            if not gate.has_work:
                continue
            for request in gate.take_passed():
                try:
                    self._pass_on(request, self._gates[index + 1 :])
                except RequestError as error:
                    gate.refuse(request, error)
            ended += gate.take_ended()
        return ended

    def _hear(self) -> None:
        """Take in the workers' answers about grammars and adapters."""
        for gate in self._gates:
            gate.hear()
        self.adapters.hear()

    def _is_busy(self) -> bool:
        return self.has_work() or self.adapters.is_reading

    def idle_s(self) -> float | None:
        """In how many seconds the caller should call `tick` while there is no work; None: not before there is."""
        waits = [self.scheduler.promotions.idle_s(), self.link.idle_s(),
                 READING_POLL_S if self.adapters.is_reading else None]
        return min((wait for wait in waits if wait is not None), default=None)

    def tick(self) -> None:
        """Carry on moves between KV tiers and adapters while there are no requests. Raises what a worker failed
        with."""
        self.link.check()
        self._hear()
        self.scheduler.promotions.tick()
        self.cache_watch.pass_on()

    def stats(self) -> EngineStats:
        """A snapshot of counters and gauges. May be called from another thread."""
        return collect_stats(self.loop, self._gates, self.link.stats())

    # --- adapters, end

    def load_adapter(self, name: str, folder: Path, on_done: OnDone) -> None:
        """Begin to read an adapter; `on_done` is called from a later `step` or `tick`, with what went wrong or None.

        Raises RequestError or EngineStateError if it cannot be loaded; nothing has begun then.
        """
        self._check_awake()
        self.adapters.load(name, folder, on_done)

    def unload_adapter(self, name: str) -> None:
        """Free an adapter's slot. Raises RequestError if there is no such adapter, EngineStateError while a request
        uses it or the engine sleeps."""
        self._check_awake()
        self.adapters.unload(name)

    def _check_awake(self) -> None:
        if self.control.sleep_level:
            raise EngineStateError("the engine sleeps; POST /wakeup wakes it")

    def shutdown(self) -> None:
        """Copy the KV cache to disk, if there is one, and end the workers after the commands sent so far."""
        try:
            if not self.link.has_ended:
                self.scheduler.promotions.close(FLUSH_S)
        except Exception:  # an engine that has failed ends all the same
            logger.exception("the KV cache was not stored")
        finally:
            if self._publisher is not None:
                self._publisher.close()
            self.link.close()
