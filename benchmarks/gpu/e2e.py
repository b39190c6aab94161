"""Section `e2e`: whole engines in float32 against transformers, one for each way in which a token can be computed.

Whatever the engine generates is given to transformers as it is. Of every place the largest log-probabilities must
agree; the engine's token must be the likeliest one wherever that is ahead by more than ten times the error.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.driver import Driver, tokens_of
from benchmarks.gpu.small_models import VOCAB, Truth, save
from xllm.metrics import EngineStats
from xllm.request import OutputDelta, TokenLogprobs

TOLERANCE = 2e-3  # of a log-probability
MARGIN = 10.0
NUM_LOGPROBS = 20

Proof = Callable[[EngineStats, list[list[OutputDelta]]], bool]


@dataclass(frozen=True, kw_only=True)
class Way:
    """settings: of the engine. logprobs: ask for them (graphs then end with logits, not with tokens). happened: that
    what it is about took place. waves: the requests are sent that many times, one after the other is done. crowded:
    they fill their first blocks all at the same time."""

    settings: dict[str, Any] = field(default_factory=dict)
    logprobs: bool = True
    prompt_logprobs: bool = False
    shuffled: bool = False
    crowded: bool = False
    waves: int = 1
    happened: Proof = lambda stats, outputs: True


def replayed(kind: str) -> Proof:
    return lambda stats, _: stats.graphs is not None and any(kind in key for key in stats.graphs.replays_total)


def cached(stats: EngineStats, outputs: list[list[OutputDelta]]) -> bool:
    return stats.cached_prompt_tokens_total > 0


def ways(bench: Bench, block_size: int) -> dict[str, Way]:
    """By name. On a CPU the capturer that checks stands in for graphs."""
    plain = {"graph_mode": "off", "async_scheduling": False, "enable_prefix_caching": False}
    graphs = {**plain, "graph_mode": "auto" if bench.device.is_cuda else "checked"}
    overlap = {"async_scheduling": True}
    found = {
        "paged": Way(settings=plain, prompt_logprobs=True),
        "tokens only": Way(settings=plain, logprobs=False),
        "chunked": Way(settings={**plain, "max_num_batched_tokens": 19}, prompt_logprobs=True),
        "prefix-cached": Way(settings={**plain, "enable_prefix_caching": True}, waves=2, happened=cached),
        "preempted": Way(settings={**plain, "num_kv_blocks": 8, "watermark": 0.0, "max_model_len": 4 * block_size},
                         crowded=True, happened=lambda stats, _: stats.preemptions_total > 0),
        "overlapped": Way(settings={**plain, **overlap}),
        "graphs": Way(settings=graphs, logprobs=False, happened=replayed("tokens")),
        "graphs, logits": Way(settings=graphs, happened=replayed("logits")),
        "graphs, overlapped": Way(settings={**graphs, **overlap}, logprobs=False, happened=replayed("tokens")),
        "graphs, prefill": Way(settings={**graphs, "graph_max_prefill_tokens": 64, "max_num_batched_tokens": 64},
                               happened=replayed("mixed")),
        "all, shuffled": Way(settings={**graphs, **overlap, "enable_prefix_caching": True,
                                       "max_num_batched_tokens": 40}, shuffled=True, waves=2, happened=cached),
    }  # fmt: skip
    if bench.device.backend.vmm is not None:
        found["xtensor"] = Way(settings={**plain, "kv_layout": "xtensor"})
    return found


def run(bench: Bench) -> None:
    for family in bench.profile.e2e_families:
        bench.attempt(family, 1.0, _run_family, bench, family)


def _run_family(bench: Bench, family: str) -> None:
    folder = save(family, bench.scratch / f"e2e-{family}", large=bench.device.is_cuda)
    truth = Truth(folder, bench.device.torch)
    for name, way in ways(bench, bench.device.backend.default_block_size).items():
        id = f"{family}/{name}"
        bench.attempt(id, 0.5, _check_way, bench, id, folder, truth, way)
    del truth
    bench.device.release_memory()


def prompts(block_size: int) -> list[list[int]]:
    """Some share a beginning longer than a block; one is a single token."""
    rng = random.Random(3)
    shared = [rng.randrange(VOCAB) for _ in range(block_size + 3)]
    lengths = (1, 7, block_size, block_size + 1, 2 * block_size + 5)
    return [shared + [rng.randrange(VOCAB) for _ in range(5)], [*shared, 9, 8],
            *([rng.randrange(VOCAB) for _ in range(n)] for n in lengths)]  # fmt: skip


def _check_way(bench: Bench, id: str, folder: Path, truth: Truth, way: Way) -> None:
    defaults: dict[str, Any] = {"max_model_len": 512, "max_num_seqs": 8, "dtype": "float32", "num_kv_blocks": 128,
                                "graph_warmup_seqs": 0}  # fmt: skip
    driver = Driver(folder, device=bench.device.kind, **{**defaults, **way.settings})
    try:
        asked, outputs = _generate(bench, driver, way)
        stats = driver.core.stats()
    finally:
        driver.close()
        bench.device.release_memory()
    err, num_checked, num_places, wrong = 0.0, 0, 0, 0
    for prompt, deltas in zip(asked, outputs, strict=True):
        agreement = compare(truth, prompt, deltas)
        err, wrong = max(err, agreement.err), wrong + agreement.wrong
        num_checked, num_places = num_checked + agreement.clear, num_places + agreement.places
    happened = way.happened(stats, outputs)
    why = "; ".join(text for text, said in ((f"logprobs differ by {err:.3g}", not err <= TOLERANCE),
                                            (f"{wrong} tokens are not the likeliest", wrong > 0),
                                            ("no token was ahead by enough to check", num_checked == 0),
                                            ("what it is about did not happen", not happened)) if said)  # fmt: skip
    bench.check(id, not why, why=why, err=err, places=num_places, places_ahead=num_checked, cfg=way.settings)


def _generate(bench: Bench, driver: Driver, way: Way) -> tuple[list[list[int]], list[list[OutputDelta]]]:
    """The prompts as they were sent, and what came for each."""
    asked, outputs = list[list[int]](), list[list[OutputDelta]]()
    wanted = {"logprobs": NUM_LOGPROBS if way.logprobs else None,
              "prompt_logprobs": NUM_LOGPROBS if way.prompt_logprobs else None}  # fmt: skip
    rng = random.Random(7)
    for _ in range(way.waves):
        batch = prompts(driver.core.config.cache.block_size or 1)
        if way.crowded:
            batch = [[rng.randrange(VOCAB) for _ in range(len(batch[4]) - 2)] for _ in range(6)]
        if way.shuffled:
            batch = [batch[0], *rng.sample(batch, len(batch))]
        num_new = 24 if bench.device.is_cuda else 8
        ids = [driver.add(prompt, rng.randint(num_new // 2, num_new) + 8 * (i == 0), **wanted)
               for i, prompt in enumerate(batch)]  # fmt: skip
        found = driver.run()
        asked += batch
        outputs += [found[request_id] for request_id in ids]
    return asked, outputs


@dataclass(frozen=True)
class Agreement:
    """err: the largest difference of a log-probability. clear: places where one token is ahead by more than `MARGIN`
    times that; wrong: those of them where the engine chose another."""

    err: float
    places: int
    clear: int
    wrong: int


def compare(truth: Truth, prompt: Sequence[int], deltas: Sequence[OutputDelta]) -> Agreement:
    """What the engine said about a prompt and what follows it, with transformers over the same tokens."""
    tokens = tokens_of(deltas)
    exact_TV = truth.logprobs([*prompt, *tokens])
    entries = [entry for delta in deltas for entry in delta.logprobs or ()]
    err = _largest_difference(exact_TV[len(prompt) - 1 :], entries)
    for delta in deltas:
        if delta.prompt_logprobs:
            said = [entry for entry in delta.prompt_logprobs if entry is not None]
            assert len(said) == len(prompt) - 1, "prompt logprobs are missing"
            err = max(err, _largest_difference(exact_TV, said))
    best = exact_TV[len(prompt) - 1 : -1].topk(2, dim=-1)
    ahead = best.values[:, 0] - best.values[:, 1] > MARGIN * max(err, TOLERANCE / MARGIN)
    chosen = torch.tensor(tokens)
    return Agreement(err, len(tokens), int(ahead.sum()), int((ahead & (chosen != best.indices[:, 0])).sum()))


def _largest_difference(exact_TV: Tensor, entries: Sequence[TokenLogprobs]) -> float:
    worst = 0.0
    for exact_V, entry in zip(exact_TV, entries):
        ids = torch.tensor([entry.token_id, *entry.top_ids])
        said = torch.tensor([entry.logprob, *entry.top_logprobs], dtype=torch.float64)
        difference = float((exact_V[ids] - said).abs().max())
        worst = difference if not difference <= worst else worst
    return worst
