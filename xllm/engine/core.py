"""`EngineCore`: the step loop over scheduler and executor, and the start-up that builds both."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from xllm import env
from xllm.config import EngineConfig
from xllm.engine.executor import Executor, InlineExecutor, ThreadExecutor
from xllm.engine.tiering import attach_tiers, has_tiers, tier_stats
from xllm.errors import ConfigError, DeviceError, IntegrityError, RequestError
from xllm.metrics import EngineStats, GraphStats
from xllm.request import OutputDelta, Request
from xllm.scheduler.scheduler import Scheduler
from xllm.step import ScheduleOutput

if TYPE_CHECKING:
    from backends.backend import Backend
    from xllm.models.config import ModelConfig
    from xllm.runner.model_runner import ModelRunner

_log = logging.getLogger(__name__)

Progress = Callable[[str, float], None]
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
        self._in_flight: deque[ScheduleOutput] = deque()
        self._check_integrity = env.check_integrity()

    def has_work(self) -> bool:
        return bool(self._in_flight) or self.scheduler.has_requests

    def step(self) -> list[OutputDelta]:
        """One turn. Returns what changed; nothing on the turn that only fills the pipeline."""
        plan = self.scheduler.schedule()
        if plan.num_rows:
            if not self._in_flight:
                self._began_s = time.monotonic()
            self.executor.submit(plan)
            self._in_flight.append(plan)
            if len(self._in_flight) <= self.executor.depth:
                return self.scheduler.take_ready()
        if not self._in_flight:
            return self._nothing_to_run()
        oldest = self._in_flight.popleft()
        outputs = self.scheduler.update(oldest, self.executor.result())
        self._count_step()
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
        report = progress or (lambda phase, share: None)
        executor: Executor = ThreadExecutor() if config.scheduler.async_scheduling else InlineExecutor()
        try:
            loaded = executor.call(lambda: _load(config, report))
        except BaseException:
            executor.shutdown()
            raise
        executor.runner = self.runner = loaded.runner
        self.model_path, self.model_config, self.config = loaded.path, loaded.model_config, loaded.config
        self.num_blocks = loaded.num_blocks
        self.loop = StepLoop(Scheduler(self.config, num_blocks=self.num_blocks), executor)
        try:
            if has_tiers(self.config.cache):
                attach_tiers(self.scheduler, executor, self.config, loaded.runner, loaded.backend, loaded.path,
                             loaded.model_config)
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
        self.scheduler.add(request)

    def abort(self, request_id: str) -> None:
        """End a request; its terminal output comes from the next `step`. Unknown ids are ignored."""
        self.scheduler.abort(request_id)

    def has_work(self) -> bool:
        """Whether `step` has anything to do or to return."""
        return self.loop.has_work()

    def step(self) -> list[OutputDelta]:
        """One step of the loop: what changed, for all requests."""
        return self.loop.step()

    def stats(self) -> EngineStats:
        """A snapshot of counters and gauges. May be called from another thread."""
        graphs = self.runner.graphs
        return collect_stats(self.loop, None if graphs is None else graphs.stats())

    def idle_s(self) -> float | None:
        """How long the caller may sleep before it calls `tick`, while there is no work; None: as long as he likes."""
        return self.scheduler.promotions.idle_s()

    def tick(self) -> None:
        """Carry on what goes on between the KV tiers while there is no work."""
        self.scheduler.promotions.tick()

    def shutdown(self) -> None:
        """Wait for the step in flight, copy the KV cache to disk where there is one, and stop the executor."""
        self.loop.executor.shutdown()
        self.scheduler.promotions.close()


def _check_prompt_ids(request: Request, vocab_size: int) -> None:
    ids = request.prompt_token_ids
    if len(ids) and not (min(ids) >= 0 and max(ids) < vocab_size):
        raise RequestError(f"prompt: token ids must be in 0 to {vocab_size - 1}", field="prompt")


@dataclass(frozen=True, kw_only=True)
class _Loaded:
    """A runner with what loading found out."""

    path: Path
    model_config: ModelConfig
    config: EngineConfig  # resolved
    num_blocks: int
    runner: ModelRunner
    backend: Backend


def _load(config: EngineConfig, report: Progress) -> _Loaded:
    """Import torch, choose the backend, read the checkpoint, make the runner."""
    report("import", 0.0)
    import torch

    from xllm.models.config import read_model_config
    from xllm.models.loader import load_model, resolve_model_path
    from xllm.runner.kv_cache import compute_dtype, plan_num_blocks
    from xllm.runner.model_runner import ModelRunner

    if config.device.num_threads:
        torch.set_num_threads(config.device.num_threads)
    backend = _open_backend(config)
    path = resolve_model_path(config.model.model, config.model.revision)
    model_config = read_model_config(path)
    resolved = config.resolve(model_max_len=model_config.max_model_len, default_block_size=backend.default_block_size)
    dtype = compute_dtype(resolved, backend, model_config)
    num_blocks = plan_num_blocks(resolved, backend, model_config, dtype)
    report("weights", 0.0)
    model = load_model(path, backend=backend, dtype=dtype, quantization=resolved.model.quantization,
                       max_model_len=resolved.model.max_model_len,
                       progress=lambda done, total: report("weights", done / max(total, 1)))
    runner = ModelRunner(resolved, backend, model, num_blocks)
    report("ready", 1.0)
    return _Loaded(path=path, model_config=model_config, config=resolved, num_blocks=num_blocks, runner=runner,
                   backend=backend)


def _open_backend(config: EngineConfig) -> Backend:
    from backends import get_backend
    from backends.backend import BackendError

    try:
        backend = get_backend(config.device.device, cache_dir=env.cache_dir(), compiled=env.compiled_kernels_allowed())
    except BackendError as error:
        raise DeviceError(str(error)) from error
    _check_ops(backend, config.device.strict_ops)
    return backend


def _check_ops(backend: Backend, strict: bool | None) -> None:
    """No silent slow path: say which hot operators come from the reference, or refuse (`strict_ops`)."""
    from backends.opset import COLD_OPS
    from backends.reference import REFERENCE

    slow = [name for name in backend.ops.inherited_from(REFERENCE) if name not in COLD_OPS]
    if not slow:
        return
    message = f"{backend.name} takes these operators from the slow reference: {', '.join(slow)}"
    if strict or (strict is None and backend.name != "cpu"):
        raise ConfigError(f"{message}. --no-strict-ops allows it")
    _log.warning(message)


def collect_stats(loop: StepLoop, graphs: GraphStats | None = None) -> EngineStats:
    """The loop's gauges and totals; reads only, so another thread may call it."""
    scheduler, pool = loop.scheduler, loop.scheduler.kv.pool
    c = scheduler.counters
    return EngineStats(
        num_running=scheduler.num_running, num_waiting=len(scheduler.waiting), num_blocks=pool.num_blocks,
        num_free_blocks=pool.num_available, kv_usage=scheduler.kv.usage, num_steps=loop.num_steps,
        last_step_s=loop.last_step_s, step_time_s=loop.step_time_s, oldest_waiting_s=scheduler.oldest_waiting_s(),
        prompt_tokens_total=c.prompt_tokens, cached_prompt_tokens_total=c.cached_prompt_tokens,
        generation_tokens_total=c.generation_tokens, preemptions_total=c.preemptions,
        prefix_queries_total=c.prefix_queries, prefix_hits_total=c.prefix_hits,
        spec_draft_tokens_total=c.draft_tokens, spec_accepted_tokens_total=c.accepted_tokens,
        requests_finished_total=dict(c.finished), swaps_total=c.swaps, cached_tokens_by_tier_total=dict(c.hits_by_tier),
        graphs=graphs, **tier_stats(scheduler.kv),
    )
