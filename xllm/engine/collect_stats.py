"""`collect_stats`: makes the `EngineStats` of an engine from its parts."""

from __future__ import annotations

from collections.abc import Sequence

from xllm.engine.gates import Gate
from xllm.engine.step_loop import StepLoop
from xllm.stats import EngineStats
from xllm.worker.messages import WorkerStats


def collect_stats(loop: StepLoop, gates: Sequence[Gate] = (), worker: WorkerStats | None = None) -> EngineStats:
    """The engine's gauges and totals now. Reads only, so another thread may call it."""
    scheduler, kv, worker = loop.scheduler, loop.scheduler.kv, worker or WorkerStats()
    c, source = scheduler.counters, kv.source_stats(worker.disk_misses)
    waiting = {"capacity": len(scheduler.waiting), "kv": len(scheduler.promotions),
               **{gate.reason: len(gate.requests) for gate in gates}}
    return EngineStats(
        num_running=scheduler.num_running, num_waiting=sum(waiting.values()), num_waiting_by_reason=waiting,
        num_blocks=kv.num_usable_blocks, num_free_blocks=kv.num_free_blocks, kv_usage=kv.usage,
        num_steps=loop.num_steps, last_step_s=loop.last_step_s, step_time_s=loop.step_time_s,
        oldest_waiting_s=scheduler.oldest_waiting_s(),
        prompt_tokens_total=c.prompt_tokens, cached_prompt_tokens_total=c.cached_prompt_tokens,
        generation_tokens_total=c.generation_tokens, preemptions_total=c.preemptions,
        prefix_queries_total=c.prefix_queries, prefix_hits_total=c.prefix_hits,
        spec_drafts_total=c.drafts, spec_draft_tokens_total=c.draft_tokens,
        spec_accepted_tokens_total=c.accepted_tokens,
        spec_accepted_tokens_by_position_total=list(c.accepted_by_position),
        requests_finished_total=dict(c.finished), swaps_total=c.swaps, cached_tokens_by_tier_total=dict(c.hits_by_tier),
        kv_tiers=source.tiers, kv_lanes=source.lanes, prefetched_blocks_total=source.prefetched_blocks,
        kv_disk_up=source.is_disk_up, graphs=worker.graphs, threads=worker.threads,
    )
