"""`xllm bench xtensor`: what the xtensor KV layout costs and saves.

`calls`: microseconds of the driver's calls, and of handing a sequence its pages. `trace`: a trace of request lengths
through the real scheduler and the real mappings on a device that computes nothing. `steady_decode`: whether mapping
is ever waited for. `decode`: step times beside block tables, in turns within one run.
"""

from __future__ import annotations

import argparse
import csv
import os
import tempfile
import threading
import time
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any

import numpy as np

from serving.commands.bench import report
from serving.commands.flags import FlagParser
from xllm.config import EngineConfig
from xllm.errors import ConfigError
from xllm.request import Request, SamplingParams
from xllm.step import NewRow, ScheduleOutput
from xllm.worker.inline import runner_of

if TYPE_CHECKING:
    from xllm.engine.core import EngineCore
    from xllm.runner.virtual_rows import VirtualRows

NUM_ROWS, MAX_LEN, BLOCK_SIZE = 32, 2048, 16  # chosen: 128 blocks a row
RUN_PAGES = 64  # pages of one call or sequence


def main(argv: list[str]) -> int:
    parser = FlagParser(prog="xllm bench xtensor", description=__doc__.splitlines()[0])
    parser.add_argument("--trace", type=Path, help="CSV with ContextTokens and GeneratedTokens (none: not measured)")
    parser.add_argument("--scale", type=float, default=8.0, help="divide the trace's lengths by this")
    parser.add_argument("--requests", type=int, default=1000, help="how many of the trace's requests")
    parser.add_argument("--rows", default="decode_b1,decode_b8", help="decode rows; empty: not measured")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", help="write the result to this file as well")
    args = parser.parse_args(argv)
    report.check(args.json, args.trace)
    core = make_core()
    try:
        virtual = runner_of(core.link).virtual_rows
        if virtual is None:
            raise ConfigError("this device has no virtual memory management")
        result = {"page_bytes": virtual.arena.page_bytes, "calls": measure_calls(virtual)}
        if args.trace is not None:
            result["trace"] = replay_trace(args, virtual)
        result["steady_decode"] = steady_decode(core)
    finally:
        core.shutdown()
    if args.rows:
        result["decode"] = compare_decode(args)
    report.write(result, args.json)
    return 0


def replay_trace(args: argparse.Namespace, virtual: VirtualRows) -> dict[str, Any]:
    """Without prefix caching and with it."""
    lengths = read_lengths(args.trace, args.scale, args.requests)
    found = {"name": args.trace.name, "lengths_divided_by": args.scale, "requests": len(lengths)}
    for caching in (False, True):
        name = "prefix_caching" if caching else "no_prefix_caching"
        report.note(f"trace, {name} ...")
        found[name] = replay(lengths, virtual, caching)
    return found


def make_core() -> EngineCore:
    """The bundled model on the xtensor layout."""
    from xllm.engine.core import EngineCore

    return EngineCore(EngineConfig.from_flat(kv_layout="xtensor", max_num_seqs=NUM_ROWS, max_model_len=MAX_LEN))


# --- single calls


def measure_calls(virtual: VirtualRows, repetitions: int = 300) -> dict[str, Any]:
    """Microseconds. `touched`: with the page faults taken at once, as the engine maps; pages hold memory already."""
    driver, size = virtual.arena.driver, virtual.arena.page_bytes
    num_pages = RUN_PAGES * 8
    address, pool = driver.reserve(3 * num_pages * size), driver.create(num_pages, size)
    rng, times = np.random.default_rng(0), {}

    def timed(call: Any) -> float:
        began = time.perf_counter()
        call()
        return (time.perf_counter() - began) * 1e6

    driver.map(address, pool, 0, num_pages)  # takes all memory
    places = 2 * rng.permutation(num_pages)[:repetitions] + num_pages
    for name, touch in (("map_page", False), ("map_page_touched", True)):
        times[name] = [timed(lambda at=at, i=i, t=touch: driver.map(address + int(at) * size, pool, i, 1, touch=t))
                       for i, at in enumerate(places)]
        times["unmap_page"] = [timed(lambda at=at: driver.unmap(address + int(at) * size, size)) for at in places]
    for name, touch in (("map_run", False), ("map_run_touched", True)):
        times[name] = [timed(lambda i=i, t=touch: driver.map(address + num_pages * size, pool, i % 8 * RUN_PAGES,
                                                             RUN_PAGES, touch=t)) for i in range(repetitions)]
    driver.release(address, 3 * num_pages * size)
    driver.destroy(pool)
    quantiles = {name: _rounded(report.quantiles(samples)) for name, samples in times.items()}
    return {"us": quantiles, "pages_in_run": RUN_PAGES, "hand_over_us": hand_over(virtual)}


def hand_over(virtual: VirtualRows, num_pages: int = RUN_PAGES, repetitions: int = 200) -> dict[str, Any]:
    """`prepare` and `take` of a step in which a sequence of 64 pages enters: its pages as another left them, or not."""
    from xllm.runner.virtual_rows import VirtualRows

    times: dict[str, list[float]] = {"reused_whole": [], "fresh_scattered": [], "fresh_neighbours": []}
    rng = np.random.default_rng(1)
    for name, samples in times.items():
        made = make_rows(virtual, num_blocks=RUN_PAGES * 8, num_rows=1, pages_per_row=num_pages)
        assert isinstance(made, VirtualRows)
        for step in range(repetitions):
            if name == "fresh_scattered":
                blocks = rng.permutation(RUN_PAGES * 8)[:num_pages].astype(np.int32)
            elif name == "fresh_neighbours":
                blocks = np.arange(num_pages, dtype=np.int32) + RUN_PAGES * (step % 8)
            else:
                blocks = np.arange(num_pages, dtype=np.int32)
            plan = entering(step, blocks)
            began = time.perf_counter()
            made.prepare(plan)
            made.take(plan)
            samples.append((time.perf_counter() - began) * 1e6)
    return {name: _rounded(report.quantiles(samples[8:])) for name, samples in times.items()}


def make_rows(virtual: VirtualRows, *, num_blocks: int, num_rows: int, pages_per_row: int) -> VirtualRows:
    """Another set of rows with real memory behind it, pages as large as the engine's."""
    from xllm.kv.xtensor import XTensor
    from xllm.runner.arena import Arena, Region
    from xllm.runner.virtual_rows import RANGES_PER_ROW, VirtualRows

    driver = virtual.arena.driver
    xtensor = XTensor(num_blocks=num_blocks, num_rows=num_rows, pages_per_row=pages_per_row,
                      max_mappings=driver.max_mappings(), num_ranges=RANGES_PER_ROW * num_rows)
    return VirtualRows(xtensor, Arena(driver, num_pages=xtensor.num_pages, num_blocks=num_blocks,
                                      regions=[Region.dense(virtual.arena.page_bytes)]))


def entering(step: int, blocks: np.ndarray) -> ScheduleOutput:
    """A plan in which row 0 ends and another sequence enters it."""
    row, none = np.zeros(1, dtype=np.int32), np.zeros(0, dtype=np.int32)
    new = NewRow(row=0, request_id=str(step), token_ids=row, num_prompt_tokens=1, num_computed_tokens=0,
                 block_ids=blocks, sampling=SamplingParams(), eos_token_ids=(), seed=0)
    return ScheduleOutput(step=step, rows_S=row, num_tokens_S=row + 1, max_drafts_S=row, samples_S=row == 0,
                          new_rows=(new,), released_rows=(0,) if step else (), append_rows_B=none, append_ids_B=none)


# --- a trace of lengths


def read_lengths(path: Path, scale: float, limit: int) -> list[tuple[int, int]]:
    """(prompt, output) tokens of each request, scaled, at least 1 each. Raises ConfigError."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))[:limit]
    try:
        scaled = [(int(int(row["ContextTokens"]) / scale), int(int(row["GeneratedTokens"]) / scale)) for row in rows]
    except (KeyError, TypeError, ValueError):
        raise ConfigError(f"{path.name}: no CSV with ContextTokens and GeneratedTokens") from None
    return [(max(1, min(prompt, MAX_LEN - 2)), max(1, output)) for prompt, output in scaled]


def replay(lengths: list[tuple[int, int]], virtual: VirtualRows, caching: bool) -> dict[str, Any]:
    """All requests at once, 32 running. Tokens are random: nothing but lengths is known of them."""
    from xllm.runner.null_runner import NullRunner
    from xllm.scheduler.scheduler import Scheduler

    num_blocks = NUM_ROWS * MAX_LEN // BLOCK_SIZE // 2
    config = EngineConfig.from_flat(max_num_seqs=NUM_ROWS, enable_prefix_caching=caching, block_size=BLOCK_SIZE)
    scheduler = Scheduler(config.resolve(model_max_len=MAX_LEN, default_block_size=BLOCK_SIZE), num_blocks=num_blocks)
    pages_per_row, before = -(-(MAX_LEN + 1) // BLOCK_SIZE), _shared_memory_bytes()
    rows = make_rows(virtual, num_blocks=num_blocks, num_rows=NUM_ROWS, pages_per_row=pages_per_row)
    runner, rng, plans = NullRunner(NUM_ROWS), np.random.default_rng(2), []
    watch = _Watch(rows)
    for i, (prompt, output) in enumerate(lengths):
        tokens = rng.integers(0, 32_000, prompt, dtype=np.int32).tolist()
        scheduler.add(Request(request_id=str(i), prompt_token_ids=tokens, eos_token_ids=(),
                              sampling=SamplingParams(max_tokens=min(output, MAX_LEN - prompt))))
    while scheduler.has_requests:
        plan = scheduler.schedule()
        if plan.num_rows:
            rows.prepare(plan)
            rows.take(plan)
            plans.append((plan, runner.run(plan)))
        if len(plans) > 1 or not plan.num_rows:
            scheduler.update(*plans.pop(0))
        watch.look(scheduler)
    c, page = rows.xtensor.counters, rows.arena.page_bytes
    return {
        "steps": watch.num_steps, "pages_mapped": c.pages_mapped, "pages_kept": c.pages_kept,
        "pages_kept_share": round(c.pages_kept / max(1, c.pages_kept + c.pages_mapped), 3),
        "driver_calls": watch.num_calls, "pages_per_call": round(c.pages_mapped / max(1, watch.num_calls), 2),
        "ranges_reused": c.ranges_reused, "fallbacks": c.fallbacks, "mappings_max": watch.mappings_max,
        "reserved_bytes": rows.arena.num_pages * page, "pool_bytes": num_blocks * page,
        "touched_bytes": _shared_memory_bytes() - before,
        "fragmentation": {"mean": round(mean(watch.waste), 4), "max": round(max(watch.waste), 4)},
        "fragmentation_if_max_len_were_reserved": round(mean(watch.waste_of_reserving), 4),
    }


class _Watch:
    """Counts the driver's calls, and samples the share of a running sequence's mapped bytes that hold no tokens."""

    def __init__(self, rows: VirtualRows):
        self._xtensor, driver = rows.xtensor, rows.arena.driver
        self.num_calls = self.num_steps = self.mappings_max = 0
        self.waste: list[float] = []
        self.waste_of_reserving: list[float] = []
        rows.arena.driver = _CountingDriver(driver, self._count)  # type: ignore[assignment]

    def _count(self) -> None:
        self.num_calls += 1

    def look(self, scheduler: Any) -> None:
        self.num_steps += 1
        self.mappings_max = max(self.mappings_max, self._xtensor.num_mappings)
        running = scheduler.rows.alive & (scheduler.kv.num_blocks_R > 0)
        pages = int(scheduler.kv.num_blocks_R[running].sum())
        if pages:
            tokens = int(scheduler.rows.cursor[running].sum())
            self.waste.append(1 - tokens / (pages * BLOCK_SIZE))
            self.waste_of_reserving.append(1 - tokens / (int(running.sum()) * MAX_LEN))


class _CountingDriver:
    """A driver that tells of its map and unmap calls."""

    def __init__(self, driver: Any, tell: Any):
        self._driver, self._tell = driver, tell

    def __getattr__(self, name: str) -> Any:
        if name in ("map", "unmap"):
            self._tell()
        return getattr(self._driver, name)


def _shared_memory_bytes() -> int:
    """Memory behind all memory files of the machine, which a pool is on the CPU."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Shmem:"))


# --- the engine


def steady_decode(core: EngineCore, batch: int = 8, num_tokens: int = 400) -> dict[str, Any]:
    """Eight sequences decode on the real engine: who makes the driver's calls, and when."""
    virtual = runner_of(core.link).virtual_rows
    assert virtual is not None
    by_thread: dict[str, int] = {}

    def count() -> None:
        name = threading.current_thread().name
        by_thread[name] = by_thread.get(name, 0) + 1

    rng, real = np.random.default_rng(3), virtual.arena.driver
    for i in range(batch):
        core.add(Request(request_id=str(i), prompt_token_ids=rng.integers(0, 4000, 100, dtype=np.int32).tolist(),
                         eos_token_ids=(), sampling=SamplingParams(temperature=0, max_tokens=num_tokens)))
    for _ in range(10):
        core.step()
    before, virtual.arena.driver = virtual.xtensor.counters.pages_mapped, _CountingDriver(real, count)
    began, steps = time.perf_counter(), core.loop.num_steps
    while core.has_work():
        core.step()
    seconds, virtual.arena.driver = time.perf_counter() - began, real
    waited = sum(number for name, number in by_thread.items() if name.startswith("xllm-runner"))
    return {"sequences": batch, "steps": core.loop.num_steps - steps,
            "step_ms": round(seconds / (core.loop.num_steps - steps) * 1e3, 3),
            "pages_mapped": virtual.xtensor.counters.pages_mapped - before,
            "calls_while_another_step_ran": sum(by_thread.values()) - waited, "calls_that_a_step_waited_for": waited}


def compare_decode(args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds a decode step, each layout in a process of its own, in turns; medians over the rounds."""
    from serving.commands.bench.random_model import write_checkpoint
    from serving.commands.bench.throughput_bench import ChildEngine, measure

    with tempfile.TemporaryDirectory(prefix="xllm-bench-") as scratch:
        folder = write_checkpoint(Path(scratch) / "model")
        workers = {name: ChildEngine(engine, folder, args.threads)
                   for name, engine in (("paged", "xllm"), ("xtensor", "xllm-xtensor"))}
        try:
            rates = measure(workers, args.rows.split(","), args.rounds)
        finally:
            for worker in workers.values():
                worker.close()
    return {"step_ms": {row: {name: round(1e3 * int(row.removeprefix("decode_b")) / median(r), 3)
                              for name, r in by_name.items()} for row, by_name in rates.items()},
            "xtensor_step_over_paged": {row: round(median(p / x for p, x in zip(by_name["paged"], by_name["xtensor"])),
                                                   4) for row, by_name in rates.items()},
            "rounds": args.rounds, "threads": args.threads}


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 2) for name, value in values.items()}
