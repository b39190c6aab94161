"""`EngineCore`: the step loop over scheduler and executor, and the start-up that builds both."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

from xllm import env
from xllm.config import EngineConfig
from xllm.engine.adapters import AdapterNames
from xllm.engine.control import EngineControl
from xllm.engine.executor import Executor, InlineExecutor, ThreadExecutor
from xllm.engine.grammars import GrammarGate
from xllm.engine.loading import LoadedModel, Progress
from xllm.engine.tiering import attach_tiers, has_tiers
from xllm.errors import IntegrityError, RequestError
from xllm.kv import failpoints
from xllm.metrics import EngineStats, GraphStats
from xllm.request import OutputDelta, Request
from xllm.scheduler.scheduler import Scheduler
from xllm.step import ScheduleOutput

if TYPE_CHECKING:
    from xllm.kv.performer import MovePerformer
    from xllm.runner.model_runner import ModelRunner

MAX_IDLE_WAIT_S = 0.05  # for moves between the KV tiers, before the step loop looks again


class StepLoop:
    """Schedule, run, update. With an executor of depth 1, step n + 1 is scheduled while n runs."""

    def __init__(self, scheduler: Scheduler, executor: Executor):
        self.scheduler = scheduler
        self.executor = executor
        self.num_steps = 0
        self.last_step_s = time.monotonic()
        self.step_time_s = 0.0
        self._began_s = self.last_step_s  # when a step was last submitted to an idle device
        self.frozen = False  # requests stay as they are; only what is in flight is finished
        self._in_flight: deque[ScheduleOutput] = deque()
        self._check_integrity = env.check_integrity()

    def has_work(self) -> bool:
        return bool(self._in_flight) or (self.scheduler.has_ready if self.frozen else self.scheduler.has_requests)

    def step(self) -> list[OutputDelta]:
        """One turn. Returns what changed; nothing on the turn that only fills the pipeline."""
        if failpoints.armed is not None:
            failpoints.hit("engine.step")
        if self.frozen:
            return self._settle_oldest() if self._in_flight else self.scheduler.take_ready()
        plan = self.scheduler.schedule()
        if plan.num_rows:
            if not self._in_flight:
                self._began_s = time.monotonic()
            self.executor.submit(plan)
            self._in_flight.append(plan)
            if len(self._in_flight) <= self.executor.depth:
                return self.scheduler.take_ready()
        return self._settle_oldest() if self._in_flight else self._nothing_to_run()

    def _settle_oldest(self) -> list[OutputDelta]:
        oldest = self._in_flight.popleft()
        outputs = self.scheduler.update(oldest, self.executor.result())
        self._count_step()
        if failpoints.armed is not None:
            failpoints.hit("engine.settled")
        self.scheduler.rates.note(int(oldest.num_tokens_S.sum()), self.step_time_s)
        return outputs

    def _nothing_to_run(self) -> list[OutputDelta]:
        ready = self.scheduler.take_ready()
        if not ready and self.scheduler.has_requests and not self.scheduler.promotions.wait(MAX_IDLE_WAIT_S):
            raise IntegrityError("requests are open but no step can be planned and none is in flight")
        return ready

    def _count_step(self) -> None:
        now = time.monotonic()
        # The device was idle before `_began_s`: that is no part of the step.
        self.step_time_s, self.last_step_s = now - max(self.last_step_s, self._began_s), now
        self.num_steps += 1
        if self._check_integrity:
            self.scheduler.check_integrity()


class EngineCore:
    """A loaded model and its step loop. Single-threaded: one thread adds, aborts and steps.

    Raises ConfigError, ModelError or DeviceError while loading. `progress(phase, share)` is called
    as loading goes on.
    """

    def __init__(self, config: EngineConfig, *, progress: Progress | None = None):
        executor: Executor = ThreadExecutor() if config.scheduler.async_scheduling else InlineExecutor()
        try:
            self._loaded = executor.call(lambda: LoadedModel(config, progress or (lambda phase, share: None)))
            self.runner: ModelRunner = executor.call(self._loaded.make_runner)
        except BaseException:
            executor.shutdown()
            raise
        loaded = self._loaded
        self.model_path, self.model_config, self.config = loaded.path, loaded.model_config, loaded.config
        self.num_blocks = loaded.num_blocks
        self.loop = StepLoop(Scheduler(self.config, num_blocks=self.num_blocks,
                                       num_reserved_blocks=loaded.backend.num_reserved_blocks), executor)
        self.grammars = GrammarGate(self.config, self.model_path, self.model_config)
        self.control = EngineControl(self)
        executor.runner, self.runner.matchers.store = self.runner, self.grammars.store
        self._performer: MovePerformer | None = None
        try:
            self.adapters = AdapterNames(
                self.config.lora, loaded, is_used=self._uses_adapter,
                put=lambda slot, adapter: executor.call(lambda: self.runner.put_adapter(slot, adapter)))
            if has_tiers(self.config.cache):
                self._performer = attach_tiers(self.scheduler, executor, self.config, self.runner, loaded.backend,
                                               loaded.path, loaded.model_config)
        except BaseException:
            executor.shutdown()
            raise

    @property
    def scheduler(self) -> Scheduler:
        return self.loop.scheduler

    def add(self, request: Request) -> None:
        """Queue a request. Raises RequestError; nothing is queued then."""
        request.sampling.check_vocabulary(self.model_config.vocab_size)
        _check_prompt_ids(request, self.model_config.vocab_size)
        if request.pooling is not None:
            request.pooling.check_width(self.model_config.hidden_size)
            if request.sampling.max_tokens != 1:
                raise RequestError("a request for an embedding has max_tokens 1", field="max_tokens")
        request = self.adapters.bind(request)
        if failpoints.armed is not None:
            failpoints.hit("engine.add")
        if not self.control.hold(request):
            self.admit(request)

    def admit(self, request: Request) -> None:
        """Queue a request that was checked and is not held any more. Raises RequestError."""
        if not self.grammars.hold(request):
            self.scheduler.add(request)

    def abort(self, request_id: str) -> None:
        """End a request; its terminal output comes from the next `step`. Unknown ids are ignored."""
        if not self.control.abort(request_id) and not self.grammars.abort(request_id):
            self.scheduler.abort(request_id)

    def _uses_adapter(self, name: str) -> bool:
        held = (*self.control.requests, *self.grammars.requests, *self.scheduler.requests)
        return any(request.lora == name for request in held)

    def abort_all(self) -> None:
        """End every open request."""
        for request_id in (*self.control.request_ids, *self.grammars.request_ids, *self.scheduler.request_ids):
            self.abort(request_id)

    @property
    def num_open(self) -> int:
        """Requests that have not ended, wherever they wait."""
        return (self.control.num_held + len(self.grammars.request_ids) + len(self.scheduler.request_ids))

    def has_work(self) -> bool:
        """Whether `step` has anything to do or to return."""
        return self.loop.has_work() or self.grammars.has_work or self.control.has_ended

    def step(self) -> list[OutputDelta]:
        """One step of the loop: what changed, for all requests."""
        if self.control.has_ended:
            return self.control.take_ended()
        if not self.grammars.has_work:
            return self.loop.step()
        if not self.loop.has_work():
            self.grammars.wait()
        self.grammars.admit(self.scheduler.add)
        return self.grammars.take_ended() + self.loop.step()

    def stats(self) -> EngineStats:
        """A snapshot of counters and gauges. May be called from another thread."""
        runner = getattr(self, "runner", None)  # falling asleep takes it away meanwhile
        graphs = None if runner is None else runner.graphs
        missed = {} if self._performer is None else self._performer.missed_total
        return collect_stats(self.loop, None if graphs is None else graphs.stats(), missed)

    def idle_s(self) -> float | None:
        """How long the caller may sleep before it calls `tick`, while there is no work; None: as long as he likes."""
        return self.scheduler.promotions.idle_s()

    def tick(self) -> None:
        """Carry on what goes on between the KV tiers while there is no work."""
        self.scheduler.promotions.tick()

    def unload(self, *, keep_weights: bool) -> None:
        """Free what the runner holds on the device; no request is open. See `EngineControl.sleep`."""
        self.runner.matchers.close()
        self.loop.executor.runner = None
        del self.runner
        self.loop.executor.call(lambda: self._loaded.free(keep_weights=keep_weights))

    def reload(self) -> None:
        """Undo `unload`. Raises as loading does; the engine then still sleeps."""
        self.runner = self.loop.executor.call(self._loaded.make_runner)
        self.loop.executor.runner, self.runner.matchers.store = self.runner, self.grammars.store

    def shutdown(self) -> None:
        """Wait for the step in flight, copy the KV cache to disk where there is one, and stop the executor."""
        self.loop.executor.shutdown()
        self.grammars.store.close()
        if not self.control.sleep_level:
            self.runner.matchers.close()
        self.scheduler.promotions.close()


def _check_prompt_ids(request: Request, vocab_size: int) -> None:
    ids = request.prompt_token_ids
    if len(ids) and not (min(ids) >= 0 and max(ids) < vocab_size):
        raise RequestError(f"prompt: token ids must be in 0 to {vocab_size - 1}", field="prompt")


def collect_stats(loop: StepLoop, graphs: GraphStats | None, missed: dict[str, int]) -> EngineStats:
    """The loop's gauges and totals; reads only, so another thread may call it. missed: reads that found no good block
    on disk, by the reason."""
    scheduler, kv = loop.scheduler, loop.scheduler.kv
    c, source = scheduler.counters, kv.source_stats(missed)
    return EngineStats(
        num_running=scheduler.num_running, num_waiting=len(scheduler.waiting), num_blocks=kv.num_usable_blocks,
        num_free_blocks=kv.num_free_blocks, kv_usage=kv.usage, num_steps=loop.num_steps,
        last_step_s=loop.last_step_s, step_time_s=loop.step_time_s, oldest_waiting_s=scheduler.oldest_waiting_s(),
        prompt_tokens_total=c.prompt_tokens, cached_prompt_tokens_total=c.cached_prompt_tokens,
        generation_tokens_total=c.generation_tokens, preemptions_total=c.preemptions,
        prefix_queries_total=c.prefix_queries, prefix_hits_total=c.prefix_hits,
        spec_drafts_total=c.drafts, spec_draft_tokens_total=c.draft_tokens,
        spec_accepted_tokens_total=c.accepted_tokens,
        spec_accepted_tokens_by_position_total=list(c.accepted_by_position),
        requests_finished_total=dict(c.finished), swaps_total=c.swaps, cached_tokens_by_tier_total=dict(c.hits_by_tier),
        kv_tiers=source.tiers, kv_lanes=source.lanes, prefetched_blocks_total=source.prefetched_blocks,
        kv_disk_up=source.is_disk_up, graphs=graphs,
    )
