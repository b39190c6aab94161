"""Cases of argmax and sampling; see `op_cases.py`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from backends.reference import REFERENCE
from benchmarks.gpu.op_cases import Cases, Check, World, later

# temperature, top_k, top_p, min_p
LIMITS = [
    (0.0, 5, 0.5, 0.0), (0.3, 0, 1.0, 0.0), (1.0, 1, 1.0, 0.0), (2.5, 40, 0.9, 0.0), (1.0, 0, 0.5, 0.02),
    (1.0, 1000, 0.999, 0.0), (2.5, 0, 0.05, 0.0), (1.0, 2, 0.0, 0.0), (1.0, 0, 1.0, 1.0), (2.5, 7, 1.0, 0.3),
    (0.7, 0, 0.9, 0.0), (1.0, 50, 0.95, 0.01),
]  # fmt: skip
SLACK = 3e-6  # of cumulated probabilities in fp32


def argmax_cases(world: World) -> Iterator[Check]:
    for i in range(world.cases):
        logits = _logits(world, i)
        if i % 2:
            logits = logits.round()  # equals, of which the first counts
        yield Check(name=f"{'x'.join(map(str, logits.shape))}{'/ties' * (i % 2)}",
                    run=later(world.ops.argmax, logits), truth=later(first_largest, logits))  # fmt: skip


def _logits(world: World, i: int) -> Tensor:
    vocab = (17, 300, 9001, 32_000, 151_936)[i % 5] if world.device.is_cuda else (17, 300, 3001)[i % 3]
    return world.randn(world.rng.choice((1, 3, len(LIMITS))), vocab) * world.rng.choice((1.0, 3.0))


def first_largest(logits_SV: Tensor) -> Tensor:
    ids = torch.arange(logits_SV.shape[1], device=logits_SV.device)
    return torch.where(logits_SV == logits_SV.amax(1, keepdim=True), ids, logits_SV.shape[1]).amin(1)


def sample_cases(world: World) -> Iterator[Check]:
    for i in range(world.cases):
        logits = _logits(world, i)
        if i % 3 == 0:
            logits = logits.round()
        rows = world.rng.sample(LIMITS, len(logits))
        yield sample_check(world, logits, rows, world.rand(len(rows)), f"{'x'.join(map(str, logits.shape))}/{i}")


def sample_check(world: World, logits: Tensor, rows: list[tuple[float, int, float, float]], uniform: Tensor,
                 name: str, judge: torch.device | None = None) -> Check:
    """A token is right if it is one that float64 draws for thresholds within rounding of the row's: out = 1 then.
    judge: where float64 is computed, if not on the device itself."""
    columns = [*zip(*rows)]
    temperature, top_p, min_p = (world.tensor(columns[c], torch.float32) for c in (0, 2, 3))
    top_k = world.tensor(columns[1], torch.int32)

    def run() -> Sequence[Tensor]:
        tokens = world.ops.sample(logits.clone(), temperature, top_k, top_p, min_p, uniform)
        known = logits.to(tokens.device if judge is None else judge)
        allowed = [token in possible_tokens(known[s], *rows[s], float(uniform[s]))
                   for s, token in enumerate(tokens.tolist())]  # fmt: skip
        return torch.tensor(allowed), tokens

    return Check(name=name, run=run, truth=lambda: (torch.ones(len(rows), dtype=torch.bool),))


def possible_tokens(logits_V: Tensor, temperature: float, top_k: int, top_p: float, min_p: float,
                    uniform: float) -> set[int]:
    """By the reference, which sorts whole rows in float64, at thresholds a little to either side."""
    off = torch.tensor([-SLACK, 0.0, SLACK], dtype=torch.float64, device=logits_V.device)
    p, m, u = (x.flatten() for x in torch.meshgrid(off, off, off, indexing="ij"))
    count, at = len(p), logits_V.device
    top_p_S = (top_p + p).clamp(max=1 - SLACK) if top_p < 1 else torch.ones(count, device=at)
    tokens = REFERENCE.sample(
        logits_V.expand(count, -1), torch.full((count,), temperature, device=at),
        torch.full((count,), top_k, device=at), top_p_S, min_p * (1 + m), (uniform + u).clamp(0, 1 - 1e-12))
    return set(tokens.tolist())


def penalise_cases(world: World) -> Iterator[Check]:
    for i in range(world.cases):
        wide, rng = _logits(world, i), world.rng
        vocab = wide.shape[1]
        order = torch.randperm(len(wide), generator=world.generator, device=world.device.torch)
        rows = order[: max(1, len(wide) - 1)]
        counts = [rng.choice((0, 1, 50, 700)) for _ in rows]
        starts = [sum(counts[:x]) for x in range(len(counts) + 1)]
        output_starts = [start + rng.randint(0, count) for start, count in zip(starts, counts)]
        yield penalise_check(world, wide, rows, world.randint(vocab, starts[-1], dtype=torch.int32), starts,
                              output_starts, f"{len(rows)}of{len(wide)}x{vocab}/{i}")  # fmt: skip


def penalise_check(world: World, logits: Tensor, rows: Tensor, tokens: Tensor, starts: list[int],
                   output_starts: list[int], name: str, judge: torch.device | None = None) -> Check:
    """judge: as of `sample_check`."""
    repetition = world.rand(len(rows)) + 0.6
    frequency, presence = (world.rand(len(rows)).double() * 2 - 1 for _ in range(2))
    at = [world.tensor(values, torch.int32) for values in (starts, output_starts)]

    def run() -> Sequence[Tensor]:
        changed = logits.clone()
        world.ops.penalise(changed, rows, tokens, at[0], at[1], repetition, frequency, presence)
        return (changed,)

    def truth() -> Sequence[Tensor]:
        changed = logits.to(judge or logits.device).double()
        ids_T, by = tokens.to(changed.device).long(), [x.to(changed.device) for x in (repetition, frequency, presence)]
        for x, row in enumerate(rows.tolist()):
            seen = ids_T[starts[x] : starts[x + 1]].unique()
            old = changed[row, seen]
            changed[row, seen] = torch.where(old > 0, old / by[0][x].double(), old * by[0][x].double())
            ids, times = ids_T[output_starts[x] : starts[x + 1]].unique(return_counts=True)
            changed[row, ids] -= by[1][x] * times + by[2][x]
        return (changed,)

    return Check(name=name, run=run, truth=truth, tolerance=1e-6)


def bitmask_cases(world: World) -> Iterator[Check]:
    """With masks that are shorter than the vocabulary, too."""
    for i in range(world.cases):
        logits = _logits(world, i)
        yield bitmask_check(world, logits, max(1, -(-logits.shape[1] // 32) - i % 2))


def bitmask_check(world: World, logits: Tensor, words: int, judge: torch.device | None = None) -> Check:
    """judge: as of `sample_check`."""
    rows = torch.randperm(len(logits), generator=world.generator, device=world.device.torch)[: 1 + len(logits) // 2]
    allowed = world.rand(len(rows), words * 32) < 0.6
    bits = (allowed.view(len(rows), words, 32).long() << torch.arange(32, device=rows.device)).sum(-1)
    mask = torch.where(bits >= 2**31, bits - 2**32, bits).int()

    def run() -> Sequence[Tensor]:
        changed = logits.clone()
        world.ops.apply_token_bitmask(changed, mask, rows)
        return (changed,)

    def truth() -> Sequence[Tensor]:
        at, vocab = judge or logits.device, logits.shape[1]
        changed = logits.to(at, copy=True)
        kept = torch.nn.functional.pad(allowed.to(at), (0, max(0, vocab - allowed.shape[1])))[:, :vocab]
        for x, row in enumerate(rows.tolist()):
            changed[row, ~kept[x]] = -torch.inf
        return (changed,)

    return Check(name=f"{len(rows)}of{'x'.join(map(str, logits.shape))}", run=run, truth=truth)


OPERATORS: dict[str, Cases] = {
    "argmax": argmax_cases, "sample": sample_cases, "penalise": penalise_cases, "apply_token_bitmask": bitmask_cases,
}  # fmt: skip
