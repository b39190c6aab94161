"""The least time that a step can take: bytes over bandwidth, operations over rate, whichever is larger.

Matrix products and attention run one after the other, so their maxima add. Operations count a multiply-add as two;
bytes are in 16 bits.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.gpu.shapes import ModelShape


@dataclass(frozen=True)
class Ceilings:
    """bandwidth: bytes a second, read and written. rate: operations a second of a large 16-bit matrix product."""

    bandwidth: float
    rate: float


H200 = Ceilings(4.3e12, 790e12)  # measured on one, by a copy and an 8192-cubed product of random numbers


@dataclass(frozen=True)
class Work:
    """Bytes moved and operations done."""

    bytes: float
    flops: float

    def seconds(self, ceilings: Ceilings) -> float:
        return max(self.bytes / ceilings.bandwidth, self.flops / ceilings.rate)


def decode_parts(shape: ModelShape, contexts: Sequence[int]) -> list[Work]:
    """One token for each sequence: matrix products, attention, the logits' way out."""
    batch, seen = len(contexts), sum(contexts) + len(contexts)
    attention = 4.0 * sum(contexts) * shape.heads * shape.head_dim * shape.layers
    return [Work(2.0 * shape.read_params, 2.0 * batch * shape.read_params),
            Work(float(seen) * shape.kv_bytes, attention), Work(2.0 * batch * shape.vocab, 0.0)]  # fmt: skip


def prefill_parts(shape: ModelShape, lengths: Sequence[int]) -> list[Work]:
    """Whole prompts, lm_head on the last token of each."""
    flops = 2.0 * sum(lengths) * shape.layer_params + 2.0 * len(lengths) * shape.head_params
    attention = 2.0 * shape.layers * shape.heads * shape.head_dim * sum(n * n for n in lengths)
    return [Work(2.0 * shape.read_params, flops), Work(0.0, attention)]


def total(parts: list[Work]) -> Work:
    return Work(sum(p.bytes for p in parts), sum(p.flops for p in parts))


def seconds(parts: list[Work], ceilings: Ceilings) -> float:
    return sum(part.seconds(ceilings) for part in parts)


def decode_s(shape: ModelShape, batch: int, context: int, ceilings: Ceilings = H200) -> float:
    return seconds(decode_parts(shape, [context] * batch), ceilings)


def prefill_s(shape: ModelShape, length: int, ceilings: Ceilings = H200) -> float:
    return seconds(prefill_parts(shape, [length]), ceilings)


@dataclass(frozen=True)
class Workload:
    """Prompts and how many tokens each is to be continued by."""

    prompts: list[list[int]]
    outputs: list[int]

    @property
    def num_output_tokens(self) -> int:
        return sum(self.outputs)


def make_workload(num_seqs: int = 256, longest: int = 1024, shortest: int = 100, vocab: int = 10_001) -> Workload:
    """The offline workload of nano-vllm's and mini-sglang's `bench.py`: seed 0, lengths drawn evenly."""
    rng = random.Random(0)
    prompts = [[rng.randint(0, vocab - 1) for _ in range(rng.randint(shortest, longest))] for _ in range(num_seqs)]
    return Workload(prompts, [rng.randint(shortest, longest) for _ in range(num_seqs)])


def workload_s(shape: ModelShape, work: Workload, ceilings: Ceilings = H200) -> float:
    """All prompts first, then steps of all sequences that still run."""
    lengths = [len(prompt) for prompt in work.prompts]
    floor = seconds(prefill_parts(shape, lengths), ceilings)
    for step in range(1, max(work.outputs)):
        running = [n + step for n, wanted in zip(lengths, work.outputs) if wanted > step]
        floor += seconds(decode_parts(shape, running), ceilings)
    return floor
