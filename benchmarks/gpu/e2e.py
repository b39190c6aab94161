"""Section `e2e`: whole engines in float32 against transformers, one for each way in which a token can be computed.

Whatever the engine generates is given to transformers as it is. Of every place the largest log-probabilities must
agree; the engine's token must be the likeliest one wherever that is ahead by more than ten times the error.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.driver import Driver, tokens_of
from benchmarks.gpu.e2e_ways import TOLERANCE, Way, more_ways, ways
from benchmarks.gpu.small_models import END_ID, NUM_LETTERS, REGEX, VOCAB, Truth, adapter_names, letter_ids, save
from xllm.errors import ConfigError
from xllm.request import OutputDelta, TokenLogprobs

MARGIN = 10.0
NUM_LOGPROBS = 20


def run(bench: Bench) -> None:
    *_, last = bench.profile.e2e_families
    for family in bench.profile.e2e_families:
        bench.attempt(family, 1.0, _run_family, bench, family, family == last)


def _run_family(bench: Bench, family: str, more: bool) -> None:
    """more: also what one family shows for all."""
    folder = save(family, bench.scratch / f"e2e-{family}", large=bench.device.is_cuda)
    truths = Truths(folder, bench.device.torch)
    found = ways(bench.device, bench.device.backend.default_block_size) | (more_ways(bench.device) if more else {})
    for name, way in found.items():
        id = f"{family}/{name}"
        if way.absent:
            bench.absent(id, way.absent)
            continue
        bench.attempt(id, 0.5, _check_way, bench, id, folder, truths, way)
    truths.clear()
    bench.device.release_memory()


class Truths:
    """transformers' models of one checkpoint, each made when it is first asked for; the last few are kept."""

    def __init__(self, folder: Path, device: torch.device):
        self._folder, self._device = folder, device
        self._found: dict[tuple[str | None, str | None, str], Truth] = {}

    def of(self, way: Way, adapter: str) -> Truth:
        key = way.kv_format, way.quantization, adapter
        if key not in self._found:
            self._found[key] = Truth(self._folder, self._device, kv_format=way.kv_format, quantization=way.quantization,
                                     adapter=adapter)  # fmt: skip
        return self._found[key]

    def clear(self) -> None:
        self._found.clear()


def prompts(block_size: int) -> list[list[int]]:
    """Some share a beginning longer than a block; one is a single token."""
    rng = random.Random(3)
    shared = [rng.randrange(VOCAB) for _ in range(block_size + 3)]
    lengths = (1, 7, block_size, block_size + 1, 2 * block_size + 5)
    return [shared + [rng.randrange(VOCAB) for _ in range(5)], [*shared, 9, 8],
            *([rng.randrange(VOCAB) for _ in range(n)] for n in lengths)]  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """What came for a request."""

    prompt: list[int]
    adapter: str
    deltas: list[OutputDelta]


def _check_way(bench: Bench, id: str, folder: Path, truths: Truths, way: Way) -> None:
    defaults: dict[str, Any] = {"max_model_len": 512, "max_num_seqs": 8, "dtype": "float32", "num_kv_blocks": 128,
                                "graph_warmup_seqs": 0}  # fmt: skip
    if way.adapters:
        defaults["lora_modules"] = tuple(f"{name}={folder / name}" for name in adapter_names(way.adapters))
    try:
        driver = Driver(folder, device=bench.device.kind, **{**defaults, **way.settings})
    except ConfigError as refusal:
        if not way.may_refuse:
            raise
        bench.device.release_memory()
        return bench.absent(id, f"refused: {refusal}"[:500])
    try:
        answers = _generate(bench, driver, way)
        stats = driver.core.stats()
    finally:
        driver.close()
        bench.device.release_memory()
    allowed = letter_ids() if way.structured else None
    found = [compare(truths.of(way, answer.adapter), answer.prompt, answer.deltas, way.tolerance,
                     typical=way.typical, allowed=allowed)
             for answer in answers]  # fmt: skip
    errors = [one.err for one in found]
    err = fmean(error**2 for error in errors) ** 0.5 if way.typical else _worst(errors)
    wrong, num_checked = sum(one.wrong for one in found), sum(one.clear for one in found)
    happened = way.happened(stats, [answer.deltas for answer in answers])
    why = "; ".join(text for text, said in ((f"logprobs differ by {err:.3g}", not err <= way.tolerance),
                                            (f"{wrong} tokens are not the likeliest", wrong > 0),
                                            ("no token was ahead by enough to check", num_checked == 0),
                                            ("what it is about did not happen", not happened)) if said)  # fmt: skip
    bench.check(id, not why, why=why, err=err, tolerance=way.tolerance, places=sum(one.places for one in found),
                places_ahead=num_checked, cfg=way.settings)  # fmt: skip


def _worst(errors: Sequence[float]) -> float:
    """The largest; NaN if there is one."""
    return max(errors, key=lambda error: float("inf") if error != error else error, default=0.0)


def _generate(bench: Bench, driver: Driver, way: Way) -> list[Answer]:
    answers, rng, num_new = list[Answer](), random.Random(7), 24 if bench.device.is_cuda else 8
    wanted: dict[str, Any] = {"logprobs": NUM_LOGPROBS if way.logprobs else None,
                              "prompt_logprobs": NUM_LOGPROBS if way.prompt_logprobs else None}  # fmt: skip
    if way.structured:
        wanted |= {"structured": {"regex": REGEX}, "ignore_eos": False, "end": (END_ID,)}
    for _ in range(way.waves):
        batch = prompts(driver.core.config.cache.block_size or 1)
        if way.crowded:
            batch = [[rng.randrange(VOCAB) for _ in range(len(batch[4]) - 2)] for _ in range(6)]
        if way.shuffled:
            batch = [batch[0], *rng.sample(batch, len(batch))]
        turns = [*adapter_names(way.adapters), ""]
        sent = []
        for i, prompt in enumerate(batch):
            count = NUM_LETTERS + 1 if way.structured else rng.randint(num_new // 2, num_new) + 8 * (i == 0)
            adapter = turns[i % len(turns)]
            sent.append((driver.add(prompt, count, lora=adapter, **wanted), prompt, adapter))
        found = driver.run()
        answers += [Answer(prompt, adapter, found[request_id]) for request_id, prompt, adapter in sent]
    return answers


@dataclass(frozen=True)
class Agreement:
    """err: the largest difference of a log-probability, or the typical one. clear: places where one token is ahead by
    more than `MARGIN` times that; wrong: those of them where the engine chose another."""

    err: float
    places: int
    clear: int
    wrong: int


def compare(truth: Truth, prompt: Sequence[int], deltas: Sequence[OutputDelta], tolerance: float = TOLERANCE, *,
            typical: bool = False, allowed: Sequence[int] | None = None) -> Agreement:
    """What the engine said about a prompt and what follows it, with transformers over the same tokens. typical: err is
    the root mean square. allowed: all that could be drawn at each place but the last, where an end token stands."""
    tokens = tokens_of(deltas)
    exact_TV = truth.logprobs([*prompt, *tokens])
    differences = [_differences(exact_TV[len(prompt) - 1 :], [e for delta in deltas for e in delta.logprobs or ()])]
    for delta in deltas:
        if delta.prompt_logprobs:
            said = [entry for entry in delta.prompt_logprobs if entry is not None]
            assert len(said) == len(prompt) - 1, "prompt logprobs are missing"
            differences.append(_differences(exact_TV, said))
    found = torch.cat(differences)
    err = float((found.square().mean().sqrt() if typical else found.abs().max()) if len(found) else 0.0)
    choices_TV = exact_TV[len(prompt) - 1 : -1]
    if allowed is not None:
        assert len(tokens) == NUM_LETTERS + 1, f"the grammar says {NUM_LETTERS} letters and an end: {tokens}"
        assert set(tokens[:-1]) <= set(allowed), f"the grammar does not allow this: {tokens}"
        tokens, forbidden = tokens[:-1], torch.ones(VOCAB, dtype=torch.bool)
        forbidden[list(allowed)] = False
        choices_TV = choices_TV[:-1].masked_fill(forbidden, -torch.inf)
    best = choices_TV.topk(2, dim=-1)
    ahead = best.values[:, 0] - best.values[:, 1] > MARGIN * max(err, tolerance / MARGIN)
    chosen = torch.tensor(tokens)
    return Agreement(err, len(tokens), int(ahead.sum()), int((ahead & (chosen != best.indices[:, 0])).sum()))


def _differences(exact_TV: Tensor, entries: Sequence[TokenLogprobs]) -> Tensor:
    """Of all log-probabilities that the engine gave, from these."""
    if not entries:
        return torch.empty(0, dtype=torch.float64)
    ids = [torch.tensor([entry.token_id, *entry.top_ids]) for entry in entries]
    said = [torch.tensor([entry.logprob, *entry.top_logprobs], dtype=torch.float64) for entry in entries]
    return torch.cat([exact_V[i] - mine for exact_V, i, mine in zip(exact_TV, ids, said)])
