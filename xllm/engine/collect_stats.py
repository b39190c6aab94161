"""`collect_stats`: makes the `EngineStats` of an engine from its parts."""

from __future__ import annotations

from collections.abc import Sequence

from xllm.cost.cost_model import FitError
from xllm.engine.gates import Gate
from xllm.engine.step_loop import StepLoop
from xllm.stats import EngineStats
from xllm.worker.messages import WorkerStats


def collect_stats(loop: StepLoop, gates: Sequence[Gate] = (), worker: WorkerStats | None = None) -> EngineStats:
    """The engine's gauges and totals now. Reads only, so another thread may call it."""
    scheduler, kv, worker = loop.scheduler, loop.scheduler.kv, worker or WorkerStats()
    cost = scheduler.cost
    waiting = {"capacity": len(scheduler.waiting), "kv": len(scheduler.promotions),
               **{gate.reason: len(gate.requests) for gate in gates}}
    return EngineStats(
        **scheduler.counters.now(), **vars(kv.source_stats(worker.tier_misses)),
        num_running=scheduler.num_running, num_waiting=sum(waiting.values()), num_waiting_by_reason=waiting,
        num_blocks=kv.num_usable_blocks, num_free_blocks=kv.num_free_blocks, kv_usage=kv.usage,
        num_steps=loop.num_steps, last_step_s=loop.last_step_s, step_time_s=loop.step_time_s,
        step_predicted_s=cost.last_predicted_s, step_cost_error=_error(cost.error),
        oldest_waiting_s=scheduler.oldest_waiting_s(), graphs=worker.graphs, threads=worker.threads,
    )


def _error(error: FitError) -> dict[str, float]:
    """By quantile; empty while nothing was compared."""
    return {"0.5": error.median, "0.9": error.p90} if error.num else {}
