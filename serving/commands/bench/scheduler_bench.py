"""`xllm bench scheduler`: what the host spends on scheduling, on a device that computes nothing.

Every figure is the scheduler's own time, measured around `schedule()` and `update()` (or the KV call
named), with the null runner's time left out. Medians over the repetitions; the minimum stands beside.
"""

from __future__ import annotations

import gc
import time
from typing import Any

import numpy as np

from serving.commands.bench import report
from serving.commands.flags import FlagParser
from xllm.config import EngineConfig
from xllm.kv.manager import KVManager
from xllm.request import Request, SamplingParams
from xllm.runner.null_runner import NullRunner
from xllm.scheduler.scheduler import Scheduler

BLOCK_SIZE = 16  # tokens; chosen: a usual size
PROMPT_TOKENS = 512  # chosen: 32 blocks


def main(argv: list[str]) -> int:
    parser = FlagParser(prog="xllm bench scheduler", description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the result to this file as well")
    parser.add_argument("--sizes", default="1,32,256,1024", help="numbers of running requests")
    parser.add_argument("--steps", type=int, default=300, help="measured steps per size")
    args = parser.parse_args(argv)
    report.check(args.json)
    gc.collect()
    steady = {size: steady_decode(int(size), args.steps) for size in args.sizes.split(",")}
    result = {
        "us_per_request_step": {size: s["us_per_request_step"]["p50"] for size, s in steady.items()},
        "prefix_hit_32k_ms": prefix_hit_ms(32_003)["p50"],
        "evict_64_us": evict_us(64, 50_000)["p50"],
        "details": {
            "steady_decode": steady,
            "steady_decode_4_drafts": {"256": steady_decode(256, args.steps, num_speculative_tokens=4)},
            "prefix_hit_32k_ms": prefix_hit_ms(32_003),
            "admit_cold_32k_ms": cold_prompt_ms(32_000),
            "evict_64_us": {str(n): evict_us(64, n) for n in (1_000, 20_000, 50_000)},
            "overload_1024_requests": overload(1024),
        },
        "goals": {"us_per_request_step": 2.0, "prefix_hit_32k_ms": 0.5, "evict_64_us": 20.0},
    }
    report.write(result, args.json)
    return 0


def make_scheduler(num_seqs: int, *, max_model_len: int, num_blocks: int, **settings: Any) -> Scheduler:
    """A scheduler with default settings but for those given."""
    config = EngineConfig.from_flat(max_num_seqs=num_seqs, block_size=BLOCK_SIZE, **settings)
    resolved = config.resolve(model_max_len=max_model_len, default_block_size=BLOCK_SIZE)
    return Scheduler(resolved, num_blocks=num_blocks)


def request(name: str, prompt: np.ndarray, max_tokens: int | None = None) -> Request:
    return Request(request_id=name, prompt_token_ids=prompt.tolist(), eos_token_ids=(32_001,),
                   sampling=SamplingParams(max_tokens=max_tokens))


def steady_decode(num_seqs: int, num_steps: int, **settings: Any) -> dict[str, Any]:
    """All sequences decode; nobody comes or goes. Overlapped: one step in flight while the next is planned."""
    max_len = PROMPT_TOKENS + (num_steps + 50) * (1 + settings.get("num_speculative_tokens", 0)) + 64
    blocks = (max_len // BLOCK_SIZE + 2) * num_seqs
    scheduler = make_scheduler(num_seqs, max_model_len=max_len, num_blocks=blocks,
                               max_num_batched_tokens=max(8192, 8 * num_seqs), **settings)
    runner, rng = NullRunner(num_seqs), np.random.default_rng(0)
    for i in range(num_seqs):
        scheduler.add(request(str(i), rng.integers(0, 32_000, PROMPT_TOKENS, dtype=np.int32)))
    schedule_us, update_us, plans = [], [], []
    counted = 0
    while counted < num_steps:
        steady = scheduler.num_running == num_seqs and bool(np.all(scheduler.rows.known > PROMPT_TOKENS + 4))
        began = time.perf_counter()
        plan = scheduler.schedule()
        planned = time.perf_counter()
        plans.append((plan, runner.run(plan)))
        if len(plans) < 2:
            continue
        resumed = time.perf_counter()
        scheduler.update(*plans.pop(0))
        done = time.perf_counter()
        if steady:
            counted += 1
            schedule_us.append((planned - began) * 1e6)
            update_us.append((done - resumed) * 1e6)
    total = [(a + b) / num_seqs for a, b in zip(schedule_us, update_us)]
    return {"us_per_request_step": report.quantiles(total), "schedule_us": report.quantiles(schedule_us),
            "update_us": report.quantiles(update_us)}


def prefix_hit_ms(num_tokens: int, repetitions: int = 30) -> dict[str, float]:
    """`schedule()` that admits a prompt all of whose full blocks are cached."""
    scheduler = make_scheduler(4, max_model_len=40_000, num_blocks=5_000, max_num_batched_tokens=40_000)
    prompt = np.random.default_rng(1).integers(0, 32_000, num_tokens, dtype=np.int32)
    runner, times = NullRunner(4), []
    for i in range(repetitions + 1):
        scheduler.add(request(str(i), prompt, max_tokens=1))
        began = time.perf_counter()
        plan = scheduler.schedule()
        times.append((time.perf_counter() - began) * 1e3)
        hit = plan.new_rows[0].num_computed_tokens
        assert hit == (0 if i == 0 else num_tokens // BLOCK_SIZE * BLOCK_SIZE)
        scheduler.update(plan, runner.run(plan))
    return report.quantiles(times[1:])


def cold_prompt_ms(num_tokens: int, repetitions: int = 20) -> dict[str, float]:
    """`schedule()` plus `update()` of a prompt that is not cached, in one step."""
    scheduler = make_scheduler(4, max_model_len=40_000, num_blocks=5_000, max_num_batched_tokens=40_000)
    runner, times, rng = NullRunner(4), [], np.random.default_rng(2)
    for i in range(repetitions):
        prompt = rng.integers(0, 32_000, num_tokens, dtype=np.int32)
        scheduler.add(request(str(i), prompt, max_tokens=1))
        began = time.perf_counter()
        plan = scheduler.schedule()
        planned = time.perf_counter()
        result = runner.run(plan)
        resumed = time.perf_counter()
        scheduler.update(plan, result)
        times.append((planned - began + time.perf_counter() - resumed) * 1e3)
    return report.quantiles(times)


def evict_us(num_evicted: int, num_leaves: int, repetitions: int = 200) -> dict[str, float]:
    """Allocation of `num_evicted` blocks from a pool that is full of cached one-block leaves."""
    kv = KVManager(num_blocks=num_leaves, block_size=BLOCK_SIZE, num_rows=1, max_tokens_per_row=num_leaves * BLOCK_SIZE)
    rng, times, row = np.random.default_rng(3), [], np.array([0])

    def add_leaves(count: int) -> None:
        for _ in range(count):
            tokens = rng.integers(0, 2**31 - 1, BLOCK_SIZE, dtype=np.int32)
            kv.enter(0, kv.lookup(tokens, ""), 0)
            kv.grow(row, np.array([1]))
            kv.commit(0, tokens, BLOCK_SIZE, -1)
            kv.leave(0, -1)

    add_leaves(num_leaves)
    repetitions = min(repetitions, num_leaves // num_evicted)
    for _ in range(repetitions):
        began = time.perf_counter()
        blocks = kv.pool.allocate(num_evicted)
        times.append((time.perf_counter() - began) * 1e6)
        kv.pool.release(blocks, -1)
        add_leaves(num_evicted)
    return report.quantiles(times)


def overload(num_seqs: int) -> dict[str, Any]:
    """A pool of 59 % of the demand: preemptions, and what steps cost meanwhile."""
    prompt_tokens, output_tokens = 256, 300
    blocks = int(0.59 * num_seqs * (prompt_tokens + output_tokens) / BLOCK_SIZE)
    scheduler = make_scheduler(num_seqs, max_model_len=1024, num_blocks=blocks, max_num_batched_tokens=8192)
    runner, rng, times, plans = NullRunner(num_seqs), np.random.default_rng(4), [], []
    for i in range(num_seqs):
        scheduler.add(request(str(i), rng.integers(0, 32_000, prompt_tokens, dtype=np.int32), output_tokens))
    while scheduler.has_requests:
        began = time.perf_counter()
        plan = scheduler.schedule()
        spent = time.perf_counter() - began
        if plan.num_rows:
            plans.append((plan, runner.run(plan)))
        if len(plans) > 1 or not plan.num_rows:
            began = time.perf_counter()
            scheduler.update(*plans.pop(0))
            times.append((spent + time.perf_counter() - began) * 1e3)
    return {"step_ms": {**report.quantiles(times), "max": max(times)},
            "preemptions": scheduler.counters.preemptions_total}
