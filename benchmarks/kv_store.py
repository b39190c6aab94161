"""What a shared KV store brings and costs, as JSON: time to the first token of prompts that another engine computed
before it was killed, over the same without the store; and decode throughput while blocks are added to it.

Usage: python -m benchmarks.kv_store [--model FOLDER] [--store DIR] [--json FILE]
"""

from __future__ import annotations

import argparse
import itertools
import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from serving.commands.bench import report
from serving.commands.bench.tiers_bench import STEPS_PER_TURN, SteppedEngine, wait_for_memory

GOALS = {"ttft_ratio": 0.3}
CONTEXTS = (500, 1000, 1500, 2000)  # tokens of a prompt; the bundled model takes 2,048
ROUNDS = 5  # prompts of each length, and repetitions of the second part


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="local folder; none: the bundled model")
    parser.add_argument("--store", help="folder of the store, on the file system to be measured; none: a temporary one")
    parser.add_argument("--json", help="write the result to this file as well")
    parser.add_argument("--writer", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.writer:
        return write(args.model, args.writer)
    with tempfile.TemporaryDirectory(prefix="xllm-bench-", dir=args.store) as folder:
        result = {"model": args.model or "bundled", "goals": GOALS, "first_token": measure_first_token(args, folder),
                  "overhead": measure_overhead(args, folder)}
    report.write(result, args.json)
    return 0


def settings(folder: str | None) -> dict[str, Any]:
    store = {} if folder is None else {"kv_store": folder, "kv_store_size": "2GiB"}
    return {"num_kv_blocks": 160, "max_num_seqs": 4, "kv_prefetch": False, "host_cache_size": "1GiB", **store}


def prompts(vocab_size: int) -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(vocab_size) for _ in range(length)] for _ in range(ROUNDS) for length in CONTEXTS]


def write(model: str | None, folder: str) -> int:
    """Engine A: computes all prompts, says when all is stored, and waits for its end."""
    engine = SteppedEngine(model, **settings(folder))
    for prompt in prompts(engine.core.facts.vocab_size):
        engine.answer(prompt, 16)
        engine.settle()
    print("stored", flush=True)
    sys.stdin.read()
    return 1


def measure_first_token(args: Any, folder: str) -> dict[str, Any]:
    """Engine B has the store and nothing else that A had; C has nothing. They take turns, prompt by prompt."""
    command = [sys.executable, "-m", "benchmarks.kv_store", "--writer", folder]
    command += ["--model", args.model] if args.model else []
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "stored\n", "the engine that fills the store has failed"
        writer.send_signal(signal.SIGKILL)
    engines = {"store": SteppedEngine(args.model, **settings(folder)),
               "cold": SteppedEngine(args.model, **settings(None))}
    wait_for_memory()
    vocab_size = engines["cold"].core.facts.vocab_size
    for engine in engines.values():  # the kernels' first call
        engine.answer([vocab_size - 1] * 300, 2)
        engine.settle()
    first_ms: dict[int, dict[str, list[float]]] = {n: {name: [] for name in engines} for n in CONTEXTS}
    for number, prompt in enumerate(prompts(vocab_size)):
        answers = {}
        for name in sorted(engines, reverse=bool(number % 2)):
            seconds, answers[name] = engines[name].answer(prompt, 16)
            engines[name].settle()
            first_ms[len(prompt)][name].append(seconds * 1e3)
        assert answers["store"] == answers["cold"], "the store changed an output"
    stats = engines["store"].core.stats()
    for engine in engines.values():
        engine.close()
    whole = sum(length // 16 * 16 - (16 if length % 16 == 0 else 0) for length in CONTEXTS) * ROUNDS
    by_length: dict[str, dict[str, Any]] = {
        str(n): {"ttft_ms": {name: round(median(ms), 2) for name, ms in found.items()},
                 "ratio": round(median(a / b for a, b in zip(found["store"], found["cold"])), 3)}
        for n, found in first_ms.items()}
    return {"by_prompt_tokens": by_length, "ttft_ratio": max(found["ratio"] for found in by_length.values()),
            "cached_share": round(stats.cached_tokens_by_tier_total["l5"] / whole, 4),
            "bytes_fetched": stats.kv_lanes["fetch"].bytes_total,
            "fetch_mb_per_s": round(stats.kv_lanes["fetch"].bytes_total / stats.kv_lanes["fetch"].busy_s_total / 1e6)}


def measure_overhead(args: Any, folder: str) -> dict[str, Any]:
    """Eight prompts at a time that never come again decode; one engine adds their blocks to the store while it does,
    the other keeps them in host memory. They take turns every few steps."""
    draw = random.Random(1)
    common = {**settings(None), "num_kv_blocks": 512, "max_num_seqs": 8, "async_scheduling": False,
              "host_cache_size": "256MiB"}
    engines = {"host": SteppedEngine(args.model, **common),
               "store": SteppedEngine(args.model, **common, kv_store=folder, kv_store_size="1GiB")}
    wait_for_memory()
    vocab_size = engines["host"].core.facts.vocab_size
    rates: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(ROUNDS + 1):
        batch = [[draw.randrange(vocab_size) for _ in range(64)] for _ in range(8)]
        runs = {name: engine.run(batch, 256) for name, engine in engines.items()}
        seconds, tokens = dict.fromkeys(engines, 0.0), dict.fromkeys(engines, 0)
        order = sorted(runs, reverse=bool(turn % 2))
        while order:
            for name in list(order):
                steps = list(itertools.islice(runs[name], STEPS_PER_TURN))
                seconds[name] += sum(s for s, _ in steps)
                tokens[name] += sum(n for _, n in steps)
                if len(steps) < STEPS_PER_TURN:
                    order.remove(name)
        for name in engines if turn else ():
            rates[name].append(tokens[name] / seconds[name])
    put = engines["store"].core.stats().kv_lanes["put"]
    for engine in engines.values():
        engine.close()
    return {"tokens_per_s": {name: round(median(found), 1) for name, found in rates.items()},
            "decode_ratio": round(median(a / b for a, b in zip(rates["store"], rates["host"])), 4),
            "bytes_added": put.bytes_total, "put_mb_per_s": round(put.bytes_total / max(put.busy_s_total, 1e-9) / 1e6),
            "files": len(list(Path(folder).glob("*/*/*.kv")))}


if __name__ == "__main__":
    sys.exit(report.ended(main))
