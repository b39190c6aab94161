"""`xllm bench throughput`: tokens per second on the CPU benchmark model, side by side with other engines.

All engines run on the same weights, each in its own process, one at a time and in turns, so that what
else happens on the machine hits all of them. Decode rates are (T(128) - T(1)) over 127 tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from serving.commands.bench import engines, report
from serving.commands.bench.engines import OWN, EngineSet
from serving.commands.bench.random_model import SHAPE, SHAPES, write_checkpoint
from serving.commands.flags import FlagParser
from xllm import env
from xllm.child_process import run_module

GOALS = {  # by shape
    "dense": {"decode_b1": 2.0, "decode_b8": 2.2, "decode_b32": 2.2, "prefill_512": 1.2, "mix": 3.0},
    "moe": {"decode_b1": 2.0, "decode_b8": 2.0, "decode_b32": 2.0, "prefill_512": 1.5, "prefill_2048": 1.5},
}
DECODE_TOKENS = 128  # of each sequence. Chosen: long enough for a steady rate, short enough for many rounds


@dataclass(frozen=True)
class Work:
    """`rate` = counted tokens / (seconds - seconds of the same prompts with one token, for decode rows)."""

    prompts: list[list[int]]
    max_tokens: list[int]
    counted: int
    subtract_prefill: bool = False


def main(argv: list[str], engine_set: EngineSet = OWN, prog: str = "xllm bench throughput") -> int:
    parser = FlagParser(prog=prog, description=__doc__.splitlines()[0])
    parser.add_argument("--vs", action="append", choices=sorted({*engine_set.names} - {"xllm"}), default=None,
                        help="an engine to compare with; may be given several times (default: none)")
    parser.add_argument("--rows", default="decode_b1,decode_b8,decode_b32,prefill_512,prefill_2048,mix")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each row and engine")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--model", help="folder of another checkpoint (token ids must be below 32000)")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="dense",
                        help="moe: with 64 experts in each layer, of which a token has 8 (default: %(default)s)")
    parser.add_argument("--json", help="write the result to this file as well")
    args = parser.parse_args(argv)
    report.check(args.json, args.model)
    with tempfile.TemporaryDirectory(prefix="xllm-bench-") as scratch:
        folder = Path(args.model) if args.model else write_checkpoint(
            Path(scratch) / "model", SHAPES[args.shape])
        workers: dict[str, ChildEngine] = {}
        try:
            for name in ["xllm", *(args.vs or [])]:
                if name in engine_set.converters:
                    report.note(f"converting the checkpoint for {name} ...")
                weights = engine_set.weights_for(name, folder, Path(scratch))
                workers[name] = ChildEngine(name, weights, args.threads, engine_set)
            rates = measure(workers, args.rows.split(","), args.rounds)
        finally:
            for worker in workers.values():
                worker.close()
    report.write(summary(workers, rates, args), args.json)
    return 0


def make_work(name: str) -> Work:
    """The rows of the table by name."""
    rng = random.Random(name)

    def prompt(length: int) -> list[int]:
        return [rng.randrange(1, SHAPE["vocab_size"]) for _ in range(length)]

    kind, _, size = name.partition("_")
    if kind == "decode":
        batch = int(size.removeprefix("b"))
        return Work([prompt(128) for _ in range(batch)], [DECODE_TOKENS] * batch, (DECODE_TOKENS - 1) * batch, True)
    if kind == "prefill":
        return Work([prompt(int(size))], [1], int(size))
    prompts = [prompt(rng.randint(64, 512)) for _ in range(32)]
    outputs = [rng.randint(32, 128) for _ in range(32)]
    return Work(prompts, outputs, sum(map(len, prompts)) + sum(outputs))


class ChildEngine:
    """One engine in a child process. tree: the folder of another version of this repository, whose engine it is."""

    def __init__(self, name: str, folder: Path, threads: int, engine_set: EngineSet = OWN, tree: Path | None = None):
        report.note(f"starting {name} ...")
        began = time.perf_counter()
        if tree is None:
            program, environment = run_module(engine_set.module), None
        else:
            program, environment = ["-P", str(engines.__file__)], env.for_child() | {"PYTHONPATH": str(tree)}
        self._process = subprocess.Popen([sys.executable, *program, name, str(folder), str(threads)], text=True,
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        self.settings = dict(self._read().get("settings", {}))
        self.start_s = time.perf_counter() - began
        self.peak_gib = 0.0

    def seconds(self, prompts: list[list[int]], max_tokens: list[int]) -> float:
        self.begin(prompts, max_tokens)
        return self.finish(max_tokens)

    def begin(self, prompts: list[list[int]], max_tokens: list[int]) -> None:
        """`finish` waits for its end."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompts": prompts, "max_tokens": max_tokens}) + "\n")
        self._process.stdin.flush()

    def finish(self, max_tokens: list[int]) -> float:
        """Seconds of what was begun."""
        answer = self._read()
        assert answer["num_tokens"] == sum(max_tokens), "the engine did not generate what it was asked for"
        self.peak_gib = answer["peak_gib"]
        return float(answer["seconds"])

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("ANSWER "):
                return dict(json.loads(line.removeprefix("ANSWER ")))
        self.close()
        raise SystemExit("an engine stopped; its error is above")

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()


def measure(workers: dict[str, ChildEngine], rows: list[str], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Tokens per second by row and engine, one value a round; engines take turns within a round."""
    rates: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        work = make_work(row)
        rates[row] = {name: [] for name in workers}
        for turn in range(rounds + 1):  # the first warms up
            for name, worker in workers.items():
                seconds = worker.seconds(work.prompts, work.max_tokens)
                if work.subtract_prefill:
                    seconds -= worker.seconds(work.prompts, [1] * len(work.prompts))
                if turn:
                    rates[row][name].append(work.counted / seconds)
        report.note(f"{row:14}" + "".join(f"  {name} {median(r):8.1f} tok/s" for name, r in rates[row].items()))
    return rates


def summary(workers: dict[str, ChildEngine], rates: dict[str, dict[str, list[float]]],
            args: argparse.Namespace) -> dict:
    """Medians, and for each peer the median of the ratios within a round."""
    ratios = {peer: {row: round(median(a / b for a, b in zip(by_name["xllm"], by_name[peer])), 3)
                     for row, by_name in rates.items()} for peer in workers if peer != "xllm"}
    return {
        "tokens_per_s": {row: {name: round(median(r), 1) for name, r in by_name.items()}
                         for row, by_name in rates.items()},
        "ratios": ratios,
        "goals_vs_transformers": GOALS[args.shape],
        "start_s": {name: round(w.start_s, 2) for name, w in workers.items()},
        "peak_gib": {name: round(w.peak_gib, 2) for name, w in workers.items()},
        "settings": {name: w.settings for name, w in workers.items() if w.settings},
        "threads": args.threads, "rounds": args.rounds, "shape": SHAPES[args.shape],
    }
