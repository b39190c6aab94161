"""`xllm profile`: measures prefills, decodes and copies of KV of a model, fits the cost model to them, and says how far
it is off.

The grid is run on an engine in this process, with the settings given. Each of its points is predicted by a model that
has not seen it. The file of `--json` is what `--cost-profile` takes (`xllm/cost/cost_file.py`).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

from serving.commands.bench import report
from serving.commands.profile_moves import SizedMoves, measure_moves
from xllm.config import CacheSettings, EngineConfig
from xllm.cost.cost_file import profile_to_json
from xllm.cost.cost_model import CostModel
from xllm.cost.fit import fit
from xllm.cost.observations import LOAD, SAVE, MeasuredStep, Profile, StepWork
from xllm.engine.core import EngineCore
from xllm.errors import ConfigError, RequestError
from xllm.request import Request, SamplingParams

DECODE_STEPS = 12  # of each point of decode. Chosen: their median is steady, and a point takes little
FOLDS = 4  # of the points, each predicted from the other three; chosen: the rest still spans the grid
KINDS = ("prefill", "decode", "load", "swap")  # of points
BATCHES = (1, 4, 16, 64)  # rows that decode at once; chosen, as far as the engine has rows
MOST_TOKENS = 4096  # of the prompts of a point; chosen: a round on a CPU should take seconds
CHUNKS = (16, 32, 64, 128, 256, 512, 1024, 2048)  # tokens of a prompt; chosen, as far as the model goes


@dataclass(frozen=True)
class Point:
    """One thing to measure: `num_rows` prompts of `num_tokens`, and how many tokens each generates."""

    kind: str  # prefill, decode
    num_rows: int
    num_tokens: int

    @property
    def name(self) -> str:
        return (f"prefill {self.num_tokens}" if self.kind == "prefill"
                else f"decode {self.num_rows} x {self.num_tokens}")


@dataclass
class MeasuredPoint:
    """The steps of a point that are of its kind, and all that ran for it."""

    own: list[MeasuredStep] = field(default_factory=list)
    all: list[MeasuredStep] = field(default_factory=list)


def run(config: EngineConfig, flags: argparse.Namespace) -> int:
    """Measure, print the table, and save the result as JSON where asked."""
    report.check(flags.json, config.model.model)
    if flags.rounds < 1:
        raise ConfigError(f"rounds must be at least 1, got {flags.rounds}")
    if config.scheduler.cost_profile is not None:
        raise ConfigError("cost_profile: a profile is measured from nothing")
    core = EngineCore(without_tiers(config))
    try:
        points = grid(core)
        measured, origin = measure(core, points, flags.rounds), core.origin
    finally:
        core.shutdown()
    moves = measure_moves(core.config, config.cache, flags.rounds)
    result = summary(points, measured, moves)
    everything = Profile([step for point in points for step in measured[point].all],
                         [move for size in moves.values() for move in size])
    print(table(result))
    save({**profile_to_json(origin, everything), "environment": report.environment(), **result}, flags.json)
    return 0


def without_tiers(config: EngineConfig) -> EngineConfig:
    """The settings with nothing below the device and no cached prefixes: a prompt that is cached would not be computed,
    and copies would run beside the steps."""
    none = CacheSettings()
    cache = dataclasses.replace(
        config.cache, enable_prefix_caching=False, preemption_mode=none.preemption_mode,
        kv_store_dtype=none.kv_store_dtype, host_cache_size=none.host_cache_size,
        host_blocks_factor=none.host_blocks_factor, disk_cache_size=none.disk_cache_size, disk_cache_dir=None,
        disk_cache_key_file=None, kv_store=None, kv_events_config=None, kv_events_token_ids=False,
        kv_events_key_file=None)
    return dataclasses.replace(config, cache=cache)


def save(result: dict[str, Any], path: str | None) -> None:
    """Save the result if a path is given: a line for each member, as most of it is numbers."""
    if path:
        lines = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in result.items())
        Path(path).write_text("{\n" + ",\n".join(lines) + "\n}\n")


def grid(core: EngineCore) -> list[Point]:
    """Prompts of rising length, then decodes of rising batches behind short and long prompts, as the engine allows.
    Raises ConfigError if it allows too little."""
    assert core.config.model.max_model_len is not None
    longest = core.config.model.max_model_len - DECODE_STEPS - 1
    num_rows = core.config.scheduler.max_num_seqs
    if longest < CHUNKS[1]:
        raise ConfigError(f"max_model_len must be at least {CHUNKS[1] + DECODE_STEPS + 1} to be profiled")
    lengths = [length for length in CHUNKS if length <= longest]
    if longest > lengths[-1] * 1.2:
        lengths.append(min(longest, MOST_TOKENS))
    num_tokens = core.scheduler.kv.num_usable_blocks * core.scheduler.kv.block_size
    contexts = sorted({lengths[0], lengths[len(lengths) // 2], lengths[-1]})
    return [*(Point("prefill", 1, length) for length in lengths),
            *(Point("decode", rows, context) for context in contexts for rows in BATCHES
              if rows <= num_rows and rows * context <= MOST_TOKENS
              and rows * (context + DECODE_STEPS + core.scheduler.kv.block_size) <= num_tokens)]


def measure(core: EngineCore, points: list[Point], rounds: int) -> dict[Point, MeasuredPoint]:
    """Run all points `rounds` times, in another order each; the round before them warms up."""
    dice, measured = random.Random(0), {point: MeasuredPoint() for point in points}
    for turn in range(rounds + 1):
        for point in dice.sample(points, len(points)):
            steps = steps_of(core, point, dice)
            if turn:
                measured[point].all += steps
                measured[point].own += [step for step in steps if is_of(point, step.work)]
        report.note(f"round {turn} of {rounds}" if turn else "warmed up")
    return measured


def steps_of(core: EngineCore, point: Point, dice: random.Random) -> list[MeasuredStep]:
    """The steps that the engine takes for a point, as its own cost model hears of them."""
    for row in range(point.num_rows):
        prompt = [dice.randrange(core.facts.vocab_size) for _ in range(point.num_tokens)]
        sampling = SamplingParams(temperature=0, max_tokens=1 if point.kind == "prefill" else DECODE_STEPS,
                                  ignore_eos=True)
        core.add(Request(request_id=str(row), prompt_token_ids=prompt, sampling=sampling))
    steps, num_steps = [], core.loop.num_steps
    while core.has_work():
        for output in core.step():
            if output.error is not None:
                raise RequestError(f"a step failed: {output.error}")
        last = core.scheduler.cost.last
        if core.loop.num_steps > num_steps and last is not None:
            steps.append(last)
        num_steps = core.loop.num_steps
    return steps


def is_of(point: Point, work: StepWork) -> bool:
    """Whether a step shows what the point is there for: prompts alone, or all its rows decoding."""
    if point.kind == "prefill":
        return work.num_decode_rows == 0
    return work.num_prefill_tokens == 0 and work.num_decode_rows == point.num_rows


def summary(points: list[Point], measured: dict[Point, MeasuredPoint], moves: SizedMoves) -> dict[str, Any]:
    """The model of all that was measured, and each point's time beside what a model without it predicts."""
    def known(left_out: int | None) -> CostModel:
        return fit(Profile([step for place, point in enumerate(points) if place % FOLDS != left_out
                            for step in measured[point].all],
                           [move for place, size in enumerate(moves.values()) if place % FOLDS != left_out
                            for move in size]))

    models, rows = [known(fold) for fold in range(FOLDS)], []
    for place, point in enumerate(points):
        if steps := measured[point].own:
            num_tokens = sum(step.work.num_prefill_tokens for step in steps)
            num = round(num_tokens / point.num_tokens)  # prompts; none where the steps are of decode
            rows.append(row(point.kind, point.name, *times(models[place % FOLDS], steps, num)))
    for place, (num_bytes, size) in enumerate(moves.items()):
        model, name = models[place % FOLDS], f"{num_bytes / 1024:.0f} KiB"
        taken = {kind: median(move.seconds for move in size if move.kind == kind) for kind in (SAVE, LOAD)}
        rows += [row("load", f"load {name}", taken[LOAD], model.load_s(num_bytes)),
                 row("swap", f"swap {name}", taken[SAVE] + taken[LOAD], model.swap_s(num_bytes))]
    return {"points": rows, "errors": {kind: error for kind in KINDS if (error := error_of_kind(rows, kind))},
            "num_steps": sum(len(m.all) for m in measured.values()), "cost_model": known(None).to_json()}


def row(kind: str, point: str, measured_s: float, predicted_s: float) -> dict[str, Any]:
    """A line of the table."""
    return {"kind": kind, "point": point, "measured_s": measured_s, "predicted_s": predicted_s}


def error_of_kind(rows: list[dict[str, Any]], kind: str) -> dict[str, float] | None:
    """Mean and 90th percentile of |predicted / measured - 1| over the points of a kind; None: there are none."""
    errors = [abs(row["predicted_s"] / row["measured_s"] - 1.0) for row in rows if row["kind"] == kind]
    return {"mean": fmean(errors), "p90": float(np.quantile(errors, 0.9)), "num": len(errors)} if errors else None


def times(model: CostModel, steps: list[MeasuredStep], num_prompts: int) -> tuple[float, float]:
    """What a point takes, and what is predicted: a step of decode in the median, or a prompt in all its steps, each
    as the median over the prompts."""
    if not num_prompts:
        return median(step.seconds for step in steps), median(model.predict(step.work) for step in steps)
    each = len(steps) // num_prompts
    prompts = [steps[first : first + each] for first in range(0, each * num_prompts, each)]
    return (median(sum(step.seconds for step in prompt) for prompt in prompts),
            median(sum(model.predict(step.work) for step in prompt) for prompt in prompts))


def table(result: dict[str, Any]) -> str:
    """For a person to read."""
    lines = [f"{'':20}{'measured ms':>12}{'predicted ms':>14}{'off':>8}"]
    for row in result["points"]:
        off = row["predicted_s"] / row["measured_s"] - 1.0
        lines.append(f"{row['point']:20}{row['measured_s'] * 1e3:12.3f}{row['predicted_s'] * 1e3:14.3f}{off:+8.1%}")
    lines.append("error of the points, each predicted without it:")
    lines += [f"  {kind:10}mean {error['mean']:.1%}, p90 {error['p90']:.1%}, {error['num']} points"
              for kind, error in result["errors"].items()]
    model = result["cost_model"]
    steps = model["steps_error"]
    lines.append(f"error of single steps, cross-validated: median {steps['median']:.1%}, p90 {steps['p90']:.1%}, "
                 f"{steps['num']} steps")
    lines.append("us each: " + ", ".join(f"{name} {price * 1e6:.4g}" for name, price in model["steps"].items()))
    lines += [f"{kind}: {move['start'] * 1e6:.4g} us and {1e-9 / max(move['byte'], 1e-18):.4g} GB/s"
              for kind, move in model["moves"].items()]
    return "\n".join(lines)
