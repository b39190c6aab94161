"""The least time that a step can take: bytes over bandwidth, operations over rate, whichever is larger.

Matrix products and attention run one after the other, so their maxima add. Operations count a multiply-add as two;
numbers have 16 bits unless `Stored` says otherwise.
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


@dataclass(frozen=True)
class Stored:
    """Bytes of a weight, and of a number in the KV cache without its part of a scale; scale: bytes of that."""

    weight: int = 2
    kv: int = 2
    scale: int = 0

    def kv_bytes(self, shape: ModelShape) -> float:
        """Of one token."""
        return shape.kv_bytes * (self.kv * shape.head_dim + self.scale) / (2 * shape.head_dim)


SIXTEEN_BITS, KV8, W8_KV8 = Stored(), Stored(kv=1, scale=1), Stored(weight=1, kv=1, scale=1)
FEW_ROWS, FASTER = 64, 2  # more rows are multiplied in the weights' 8 bits, at so many times the rate


def decode_parts(shape: ModelShape, contexts: Sequence[int], stored: Stored = SIXTEEN_BITS) -> list[Work]:
    """One token for each sequence: matrix products, attention, the logits' way out."""
    batch, seen = len(contexts), sum(contexts) + len(contexts)
    attention = 4.0 * sum(contexts) * shape.heads * shape.head_dim * shape.layers
    products = 2.0 * batch * shape.read_params / (FASTER if stored.weight == 1 and batch > FEW_ROWS else 1)
    return [Work(float(stored.weight * shape.read_params), products),
            Work(seen * stored.kv_bytes(shape), attention), Work(2.0 * batch * shape.vocab, 0.0)]  # fmt: skip


def prefill_parts(shape: ModelShape, lengths: Sequence[int]) -> list[Work]:
    """Whole prompts, lm_head on the last token of each."""
    flops = 2.0 * sum(lengths) * shape.layer_params + 2.0 * len(lengths) * shape.head_params
    attention = 2.0 * shape.layers * shape.heads * shape.head_dim * sum(n * n for n in lengths)
    return [Work(2.0 * shape.read_params, flops), Work(0.0, attention)]


def total(parts: list[Work]) -> Work:
    return Work(sum(p.bytes for p in parts), sum(p.flops for p in parts))


def seconds(parts: list[Work], ceilings: Ceilings) -> float:
    return sum(part.seconds(ceilings) for part in parts)


def decode_s(shape: ModelShape, batch: int, context: int, ceilings: Ceilings = H200,
             stored: Stored = SIXTEEN_BITS) -> float:
    return seconds(decode_parts(shape, [context] * batch, stored), ceilings)


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
