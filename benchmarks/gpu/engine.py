"""Section `engine`: the whole engine on random weights of real shapes: decode steps, prefills, the offline workload,
and requests that arrive by chance; then, of the largest, decode steps with numbers of one byte."""

from __future__ import annotations

import random
import time
from typing import Any

from benchmarks.gpu import predictions
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.device import Timing
from benchmarks.gpu.driver import Driver, measured_engine, shapes
from benchmarks.gpu.online import serve
from benchmarks.gpu.roofline import KV8, W8_KV8, Stored, Workload, make_workload
from benchmarks.gpu.shapes import ModelShape
from xllm.errors import ConfigError

SETTLE_STEPS = 4  # after the last prompt: the first step of a bucket captures its graph
SMALL_TOKENS = 10_000  # prompts are drawn from the first ids
# What an id begins with, the engine's settings, and what the roofline counts.
BYTE_FORMS: dict[str, tuple[dict[str, Any], Stored]] = {
    "decode.w8kv8": ({"quantization": "fp8", "kv_cache_dtype": "fp8"}, W8_KV8),
    "decode.kv8": ({"kv_cache_dtype": "fp8"}, KV8),
}


def run(bench: Bench) -> None:
    predict(bench)
    for shape in shapes(bench):
        bench.attempt(f"engine/{shape.name}", 5.0 if bench.device.is_cuda else 0.0, _run_model, bench, shape)
    largest = shapes(bench)[-1]
    for form in BYTE_FORMS:
        id = f"engine/{largest.name}/{form}"
        bench.attempt(id, 5.0 if bench.device.is_cuda else 0.0, _run_form, bench, largest, id, form)


def predict(bench: Bench) -> None:
    """Written down before anything runs."""
    profile, ceilings, found = bench.profile, bench.floor_ceilings, dict[str, Any]()
    for shape in shapes(bench):
        for id, batch, context in decode_rows(bench, shape):
            found[id] = predictions.decode(shape, batch, context, ceilings)
        for tokens in profile.prefills:
            found[f"prefill/{shape.name}/T{tokens}"] = predictions.prefill(shape, tokens, ceilings)
        found[f"workload/{shape.name}"] = predictions.workload(shape, offline(bench, shape), ceilings)
    largest = shapes(bench)[-1]
    for form, (_, stored) in BYTE_FORMS.items():
        for id, batch, context in form_rows(bench, largest, form):
            found[id] = predictions.decode(largest, batch, context, ceilings, stored)
    bench.results.put("predictions", found)


def decode_rows(bench: Bench, shape: ModelShape) -> list[tuple[str, int, int]]:
    """(id, sequences, tokens of context)."""
    return [(f"decode/{shape.name}/B{batch}/ctx{context}", batch, context) for context in bench.profile.contexts
            for batch in bench.profile.batches]  # fmt: skip


def form_rows(bench: Bench, shape: ModelShape, form: str) -> list[tuple[str, int, int]]:
    """Likewise, with the first context alone."""
    context = bench.profile.contexts[0]
    return [(f"{form}/{shape.name}/B{batch}/ctx{context}", batch, context) for batch in bench.profile.batches]


def offline(bench: Bench, shape: ModelShape) -> Workload:
    return make_workload(*bench.profile.workload, vocab=min(SMALL_TOKENS + 1, shape.vocab))


def _run_model(bench: Bench, shape: ModelShape) -> None:
    profile, work = bench.profile, offline(bench, shape)
    steps = profile.decode_steps + SETTLE_STEPS + 2
    block = bench.device.backend.default_block_size
    most = max(batch * (context + steps + 2 * block) for _, batch, context in decode_rows(bench, shape))
    held = sum(len(p) + n + 2 * block for p, n in zip(work.prompts, work.outputs))
    with measured_engine(bench, shape, int(max(most, held) * 1.1)) as driver:
        id = f"workload/{shape.name}"
        bench.attempt(id, 3 * _predicted_s(bench, id), workload, bench, driver, shape, work)
        for id, batch, context in decode_rows(bench, shape):
            bench.attempt(id, 2 * _decode_cost_s(bench, id, shape, batch, context), decode, bench, driver, shape, id,
                          batch, context)  # fmt: skip
        for tokens in profile.prefills:
            bench.attempt(f"prefill/{shape.name}/T{tokens}", 0.0, prefill, bench, driver, shape, tokens)
        for share in profile.online_shares:
            id = f"online/{shape.name}/{share}"
            bench.attempt(id, 1.5 * profile.online_s, online, bench, driver, shape, id, work, share)


def _run_form(bench: Bench, shape: ModelShape, id: str, form: str) -> None:
    rows, (settings, _) = form_rows(bench, shape, form), BYTE_FORMS[form]
    margin = bench.profile.decode_steps + SETTLE_STEPS + 2 + 2 * bench.device.backend.default_block_size
    tokens = int(max(batch * (context + margin) for _, batch, context in rows) * 1.1)
    try:
        with measured_engine(bench, shape, tokens, **settings) as driver:
            for row, batch, context in rows:
                bench.attempt(row, 2 * _decode_cost_s(bench, row, shape, batch, context), decode, bench, driver, shape,
                              row, batch, context)  # fmt: skip
    except ConfigError as refusal:
        bench.absent(id, f"refused: {refusal}"[:500])


def online(bench: Bench, driver: Driver, shape: ModelShape, id: str, work: Workload, share: float) -> None:
    """Requests at a share of the offline rate, if that is known."""
    found = [row["us"] for row in bench.results.rows if row["id"] == f"workload/{shape.name}" and "us" in row]
    if not found:
        return bench.absent(id, "the offline rate is not known")
    serve(bench, driver, id, work, len(work.prompts) / (found[0] * 1e-6) * share)


def _predicted_s(bench: Bench, id: str) -> float:
    return bench.results.data["predictions"][id]["us"] * 1e-6


def _decode_cost_s(bench: Bench, id: str, shape: ModelShape, batch: int, context: int) -> float:
    prompts_s = predictions.prefill(shape, context, bench.floor_ceilings)["us"] * batch * 1e-6
    return prompts_s + _predicted_s(bench, id) * bench.profile.decode_steps


def decode(bench: Bench, driver: Driver, shape: ModelShape, id: str, batch: int, context: int) -> None:
    """The time of a step when `batch` sequences of about `context` tokens each take one token."""
    steps = bench.profile.decode_steps
    if not _fits(driver, batch, context + steps + SETTLE_STEPS + 2):
        return bench.absent(id, "does not fit: too little memory for so many KV blocks")
    start_decoding(driver, batch, context, shape.vocab)
    samples, _ = step_times(driver, SETTLE_STEPS + steps)
    driver.abort_all()
    timing = Timing.of(samples[SETTLE_STEPS:])
    bench.row(id, timing=timing, cfg={"B": batch, "context": context}, tokens_per_s=batch / timing.us * 1e6,
              **against(bench, id, timing.us))  # fmt: skip


def _fits(driver: Driver, batch: int, length: int) -> bool:
    block_size = driver.core.config.cache.block_size
    assert block_size is not None
    return batch * -(-length // block_size) <= 0.98 * driver.core.num_blocks


def start_decoding(driver: Driver, batch: int, context: int, vocab: int) -> None:
    """Add sequences and step until each of them has a token."""
    rng, longest = random.Random(batch), driver.core.config.model.max_model_len
    assert longest is not None
    begun: set[str] = set()
    for _ in range(batch):
        driver.add([rng.randrange(min(vocab, SMALL_TOKENS)) for _ in range(context)], longest - context)
    while len(begun) < batch:
        begun |= {delta.request_id for delta in driver.step() if delta.token_ids}


def step_times(driver: Driver, count: int) -> tuple[list[float], int]:
    """Microseconds from each step's outputs to the next one's, and how many tokens came."""
    samples, tokens, last = list[float](), 0, time.perf_counter()
    while len(samples) < count:
        deltas = driver.step()
        now = time.perf_counter()
        if deltas:
            samples.append((now - last) * 1e6)
            tokens, last = tokens + sum(len(delta.token_ids) for delta in deltas), now
    return samples, tokens


def against(bench: Bench, id: str, us: float) -> dict[str, Any]:
    """The row's prediction beside what was measured."""
    predicted = bench.results.data["predictions"][id]
    return {"prediction": predicted, "floor_us": predicted["floor_us"], "pct_floor": 100 * predicted["floor_us"] / us,
            "pct_prediction": 100 * predicted["us"] / us}  # fmt: skip


def prefill(bench: Bench, driver: Driver, shape: ModelShape, tokens: int) -> None:
    """From a prompt's arrival at an idle engine to its first token."""
    rng, samples, id = random.Random(tokens), list[float](), f"prefill/{shape.name}/T{tokens}"
    for _ in range(bench.profile.prefill_repeats + 1):
        prompt = [rng.randrange(min(shape.vocab, SMALL_TOKENS)) for _ in range(tokens)]
        began = time.perf_counter()
        driver.add(prompt, 1)
        driver.run()
        samples.append((time.perf_counter() - began) * 1e6)
    timing = Timing.of(samples[1:])
    bench.row(id, timing=timing, cfg={"T": tokens}, tokens_per_s=tokens / timing.us * 1e6,
              **against(bench, id, timing.us))  # fmt: skip


def workload(bench: Bench, driver: Driver, shape: ModelShape, work: Workload) -> None:
    """All requests at once."""
    warm_up(driver, work)
    before, began = driver.core.stats(), time.perf_counter()
    for prompt, count in zip(work.prompts, work.outputs):
        driver.add(prompt, count, temperature=0.6)
    tokens = sum(len(delta.token_ids) for deltas in driver.run().values() for delta in deltas)
    seconds, after = time.perf_counter() - began, driver.core.stats()
    id = f"workload/{shape.name}"
    bench.check(f"{id}/all tokens", tokens == work.num_output_tokens,
                why=f"{tokens} tokens came, {work.num_output_tokens} were asked for")  # fmt: skip
    bench.row(id, us=seconds * 1e6, tokens_per_s=tokens / seconds, steps=after.num_steps - before.num_steps,
              preemptions=after.preemptions_total - before.preemptions_total, graphs=graph_facts(after),
              cfg={"sequences": len(work.prompts), "input": sum(map(len, work.prompts)), "output": tokens},
              **against(bench, id, seconds * 1e6))  # fmt: skip


def warm_up(driver: Driver, work: Workload) -> None:
    """A short run, in which kernels are compiled and the buckets of many sizes captured."""
    for prompt, count in zip(work.prompts, work.outputs):
        driver.add(prompt[:8], 2 + count * 64 // max(work.outputs), temperature=0.6)
    driver.run()


def graph_facts(stats: Any) -> dict[str, Any] | None:
    graphs = stats.graphs
    if graphs is None:
        return None
    return {"graphs": graphs.num_graphs, "bytes": graphs.num_bytes, "captures": graphs.captures_total,
            "replays": dict(graphs.replays_total), "fallbacks": dict(graphs.fallbacks_total)}  # fmt: skip

