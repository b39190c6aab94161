"""`xllm bench tiers`: what host memory and disk below the KV cache bring, and what they cost.

turns      conversations whose contexts exceed the device's KV cache many times over: time to the first token of later
           turns with tiers, and with a restart between two turns, over the same without tiers
overhead   decode throughput with tiers that are never hit, over the same without
stall      p99 step time of a decoding batch while blocks are copied down without a pause, over the same in quiet

Engines are in one process and take turns, so that what else happens on the machine hits all of them.
"""

from __future__ import annotations

import gc
import itertools
import random
import tempfile
import threading
import time
from collections.abc import Iterator
from statistics import median
from typing import Any

from serving.commands.bench import report
from serving.commands.flags import FlagParser
from xllm.config import EngineConfig
from xllm.engine.core import EngineCore
from xllm.errors import ConfigError
from xllm.kv.tiers import TieredStore
from xllm.request import Request, SamplingParams

PARTS = ("turns", "overhead", "stall")
GOALS = {"ttft_ratio_tiers": 0.5, "ttft_ratio_restart": 0.6, "decode_ratio": 0.98, "p99_step_ratio": 1.3}
HOST_BYTES = "1GiB"
STEPS_PER_TURN = 8  # tokens that each turn generates. Chosen: the prompts are what is measured


def main(argv: list[str]) -> int:
    parser = FlagParser(prog="xllm bench tiers", description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="local folder or Hub id; none: the bundled model")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--context", type=int, default=1500, help="tokens of a conversation's first turn")
    parser.add_argument("--over", type=float, default=8.0, help="all contexts over the device's KV cache")
    parser.add_argument("--turns", type=int, default=3, help="turns of each conversation")
    parser.add_argument("--rounds", type=int, default=5, help="repetitions of overhead and stall")
    parser.add_argument("--disk-dir", help="where to put the disk tier (default: a temporary folder)")
    parser.add_argument("--json", help="write the result to this file as well")
    args = parser.parse_args(argv)
    report.check(args.json, args.model)
    parts = args.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        raise ConfigError(f"unknown part {sorted(unknown)[0]!r}; known are {', '.join(PARTS)}")
    result: dict[str, Any] = {"model": args.model or "bundled", "goals": GOALS}
    with tempfile.TemporaryDirectory(prefix="xllm-bench-", dir=args.disk_dir) as folder:
        if "turns" in parts:
            result["turns"] = measure_turns(args, folder)
        if "overhead" in parts:
            result["overhead"] = measure_overhead(args)
        if "stall" in parts:
            result["stall"] = measure_stall(args, folder)
    report.write(result, args.json)
    return 0


class SteppedEngine:
    """One engine, driven step by step."""

    def __init__(self, model: str | None, **settings: Any):
        self.core = EngineCore(EngineConfig.from_flat(model=model, **settings))
        self._num_requests = 0

    @property
    def tiers(self) -> TieredStore:
        tiers = self.core.scheduler.kv.source
        assert isinstance(tiers, TieredStore)
        return tiers

    def add(self, prompt: list[int], num_tokens: int) -> str:
        name = str(self._num_requests)
        self._num_requests += 1
        sampling = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        self.core.add(Request(request_id=name, prompt_token_ids=prompt, sampling=sampling))
        return name

    def run(self, prompts: list[list[int]], num_tokens: int) -> Iterator[tuple[float, int]]:
        """Complete prompts; yields (seconds of the step, tokens that came) for each step."""
        for prompt in prompts:
            self.add(prompt, num_tokens)
        while self.core.has_work():
            began = time.perf_counter()
            deltas = self.core.step()
            yield time.perf_counter() - began, sum(len(d.token_ids) for d in deltas)

    def answer(self, prompt: list[int], num_tokens: int) -> tuple[float, list[int]]:
        """(seconds to the first token, tokens) of one request, alone."""
        self.add(prompt, num_tokens)
        began, first_s, tokens = time.perf_counter(), 0.0, list[int]()
        while self.core.has_work():
            for delta in self.core.step():
                tokens += delta.token_ids
            first_s = first_s or (time.perf_counter() - began if tokens else 0.0)
        return first_s, tokens

    def settle(self, timeout_s: float = 30.0) -> None:
        """Let the moves between the tiers come to an end, as they would while nobody asks."""
        deadline_s = time.monotonic() + timeout_s
        while self.core.idle_s() is not None and time.monotonic() < deadline_s:
            time.sleep(self.core.idle_s() or 0.0)
            self.core.tick()

    def close(self) -> None:
        self.core.shutdown()
        gc.collect()


def measure_turns(args: Any, folder: str) -> dict[str, Any]:
    """Each conversation's turn runs on every engine before the next one's; first turns are not counted."""
    probe = SteppedEngine(args.model, num_kv_blocks=4096, max_num_seqs=1)
    max_len, block_size = probe.core.config.model.max_model_len, probe.core.config.cache.block_size
    vocab_size = probe.core.facts.vocab_size
    probe.close()
    assert max_len and block_size
    num_blocks = -(-max_len // block_size) + 8
    num_talks = max(2, round(args.over * num_blocks * block_size / args.context))
    device = {"num_kv_blocks": num_blocks, "max_num_seqs": 4, "kv_prefetch": False}
    stored = {**device, "host_cache_size": HOST_BYTES}
    on_disk = {**stored, "disk_cache_size": "2GiB", "disk_cache_dir": folder}
    engines = {"off": SteppedEngine(args.model, **device), "tiers": SteppedEngine(args.model, **stored),
               "restart": SteppedEngine(args.model, **on_disk)}
    rng = random.Random(0)
    talks = [[rng.randrange(vocab_size) for _ in range(args.context)] for _ in range(num_talks)]
    first_ms: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(args.turns):
        if turn:
            engines["restart"].close()
            engines["restart"] = SteppedEngine(args.model, **on_disk)
        for talk in talks:
            answers = {}
            for name, engine in engines.items():
                seconds, answers[name] = engine.answer(talk, 16)
                engine.settle()
                if turn:
                    first_ms[name].append(seconds * 1e3)
            assert answers["off"] == answers["tiers"] == answers["restart"], "tiers changed an output"
            talk += answers["off"] + [rng.randrange(vocab_size) for _ in range(32)]
        report.note(f"turn {turn + 1} of {args.turns}")
    stats = {name: engine.core.stats() for name, engine in engines.items()}
    for engine in engines.values():
        engine.close()
    ratios = {name: round(median(a / b for a, b in zip(first_ms[name], first_ms["off"])), 3)
              for name in ("tiers", "restart")}
    return {
        "conversations": num_talks, "context_tokens": args.context, "device_blocks": num_blocks,
        "contexts_over_device": round(num_talks * args.context / (num_blocks * block_size), 2),
        "ttft_ms": {name: report.quantiles(values) for name, values in first_ms.items()},
        "ttft_ratio_tiers": ratios["tiers"], "ttft_ratio_restart": ratios["restart"],
        "cached_tokens_by_tier": {name: s.cached_tokens_by_tier_total for name, s in stats.items()},
    }


def measure_overhead(args: Any) -> dict[str, Any]:
    """Prompts that never come again, so that nothing is ever found below; all they do is go down.

    The engines take turns every few steps, because the machine's own noise is far larger than what is measured; without
    overlapped scheduling, so that no step of the one runs in the turn of the other.
    """
    rng = random.Random(0)
    common = {"num_kv_blocks": 512, "max_num_seqs": 8, "async_scheduling": False}
    engines = {"off": SteppedEngine(args.model, **common),
               "tiers": SteppedEngine(args.model, host_cache_size="256MiB", **common)}
    wait_for_memory()
    vocab_size = engines["off"].core.facts.vocab_size
    rates: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(args.rounds + 1):
        prompts = [[rng.randrange(vocab_size) for _ in range(64)] for _ in range(8)]
        runs = {name: engine.run(prompts, 256) for name, engine in engines.items()}
        seconds, tokens = dict.fromkeys(engines, 0.0), dict.fromkeys(engines, 0)
        order = sorted(runs, reverse=bool(turn % 2))
        while order:
            for name in list(order):
                slice_ = list(itertools.islice(runs[name], STEPS_PER_TURN))
                seconds[name] += sum(s for s, _ in slice_)
                tokens[name] += sum(n for _, n in slice_)
                if len(slice_) < STEPS_PER_TURN:
                    order.remove(name)
        if turn:
            for name in engines:
                rates[name].append(tokens[name] / seconds[name])
    found = engines["tiers"].core.stats()
    for engine in engines.values():
        engine.close()
    ratios = [a / b for a, b in zip(rates["tiers"], rates["off"])]
    return {"tokens_per_s": {name: round(median(r), 1) for name, r in rates.items()},
            "decode_ratio": round(median(ratios), 4), "decode_ratios": [round(r, 4) for r in ratios],
            "bytes_saved": found.kv_lanes["save"].bytes_total,
            "hit_tokens": {k: v for k, v in found.cached_tokens_by_tier_total.items() if k in ("l3", "l4")}}


def measure_stall(args: Any, folder: str) -> dict[str, Any]:
    """A batch decodes; in the loud phases every block that the device has cached is copied down again and again."""
    engine = SteppedEngine(args.model, num_kv_blocks=1024, max_num_seqs=16, host_cache_size="256MiB",
                           disk_cache_size="1GiB", disk_cache_dir=folder + "/stall", kv_prefetch=False)
    rng, vocab_size = random.Random(1), engine.core.facts.vocab_size
    wait_for_memory()
    for _ in range(6):  # fills the device with what can go down
        engine.answer([rng.randrange(vocab_size) for _ in range(args.context)], 2)
    engine.settle()
    steps: dict[str, list[float]] = {"quiet": [], "loud": []}
    lanes = engine.tiers.moves.stats
    before = {name: lanes[name].num_bytes for name in ("save", "write")}
    for turn in range(2 * args.rounds):
        phase = "loud" if turn % 2 else "quiet"
        prompts = [[rng.randrange(vocab_size) for _ in range(32)] for _ in range(8)]
        pushed_at = 0
        for number, (seconds, _) in enumerate(engine.run(prompts, 200)):
            if number > pushed_at + 5:  # the prompts are computed; emptying the tiers is the benchmark's own work
                steps[phase].append(seconds * 1e3)
            if phase == "loud" and push_down(engine.tiers):
                pushed_at = number
        engine.settle()
    moved = {name: lanes[name].num_bytes - before[name] for name in before}
    loud_s = sum(steps["loud"]) / 1e3
    engine.close()
    quiet, loud = report.quantiles(steps["quiet"]), report.quantiles(steps["loud"])
    return {"step_ms": {"quiet": quiet, "loud": loud}, "p99_step_ratio": round(loud["p99"] / quiet["p99"], 3),
            "p50_step_ratio": round(loud["p50"] / quiet["p50"], 3),
            "moved_mb_per_s": {name: round(count / loud_s / 1e6, 1) for name, count in moved.items()}}


def wait_for_memory() -> None:
    """Until the host memory of new engines has been given by the system."""
    while any(thread.name == "xllm-kv-populate" for thread in threading.enumerate()):
        time.sleep(0.05)


def push_down(tiers: TieredStore) -> bool:
    """If nothing is going down, forget what is below and begin again; whether it did."""
    if not (tiers.saver.is_idle and tiers.writer.is_idle):
        return False
    tiers.host.clear()
    if tiers.disk is not None:
        tiers.disk.clear()
    tiers.begin_flush()
    return True
