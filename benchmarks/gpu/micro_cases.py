"""What section `micro` measures: operators at sizes that models have, with the least bytes and operations of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu.device import Call, Device
from benchmarks.gpu.paged import PagedStep
from benchmarks.gpu.profile import Profile
from benchmarks.gpu.roofline import Work
from benchmarks.gpu.shapes import SHAPES, ModelShape


@dataclass(frozen=True, kw_only=True)
class MicroCase:
    """calls(n): the operator over n sets of inputs. reference: likewise a yardstick, and its name. num_bytes: that one
    set takes, by which sets are counted."""

    id: str
    work: Work
    calls: Callable[[int], Sequence[Call]]
    num_bytes: int
    cfg: dict[str, Any] = field(default_factory=dict)
    reference: tuple[str, Callable[[int], Sequence[Call]]] | None = None


class Bank:
    """Random inputs of the dtype that the device computes in."""

    def __init__(self, device: Device):
        self.device, self.ops = device, device.backend.ops
        self.dtype = torch.bfloat16 if device.is_cuda else torch.float32
        self.itemsize = self.dtype.itemsize
        self.generator = device.generator(1)

    def randn(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device.torch).normal_(generator=self.generator)


def all_cases(device: Device, profile: Profile, *, once: bool = False) -> Iterator[MicroCase]:
    """once: one size of each kernel, to compile it."""
    bank = Bank(device)
    for name in profile.models:
        shape = SHAPES[name]
        yield from decode_attention(bank, shape, profile, once=once)
        yield from prefill_attention(bank, shape, profile.prefills[:1] if once else profile.prefills)
        for tokens in profile.micro_tokens[:2] if once else profile.micro_tokens:
            yield from linears(bank, shape, tokens)
            yield from rowwise(bank, shape, tokens)
    for rows in profile.batches[:1] if once else profile.batches:
        yield from sampling(bank, SHAPES[profile.models[-1]].vocab, rows)


def matrices(shape: ModelShape) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of a layer's products and of lm_head."""
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return {"qkv": (q + 2 * kv, shape.hidden), "o": (shape.hidden, q), "gate_up": (2 * shape.ffn, shape.hidden),
            "down": (shape.hidden, shape.ffn), "lm_head": (shape.vocab, shape.hidden)}  # fmt: skip


def linears(bank: Bank, shape: ModelShape, tokens: int) -> Iterator[MicroCase]:
    for name, (Y, X) in matrices(shape).items():
        if name == "lm_head" and tokens > 256:
            continue
        for quantization in (None, "int8", "fp8"):
            if quantization is not None and name in ("o", "lm_head"):
                continue  # the others show the same
            weight_bytes = Y * X * (1 if quantization else bank.itemsize)
            moved = weight_bytes + tokens * (X + Y) * bank.itemsize
            yield MicroCase(
                id=f"linear/{shape.name}/{name}/{quantization or 'plain'}/T{tokens}", num_bytes=weight_bytes,
                work=Work(moved, 2.0 * tokens * X * Y), cfg={"T": tokens, "Y": Y, "X": X, "quantization": quantization},
                calls=lambda n, q=quantization, Y=Y, X=X: linear_calls(bank, n, tokens, Y, X, q))  # fmt: skip


def linear_calls(bank: Bank, count: int, tokens: int, Y: int, X: int, quantization: str | None) -> list[Call]:
    def one() -> Call:
        packed = bank.ops.pack_linear(bank.randn(Y, X), quantization=quantization)
        x = bank.randn(tokens, X)
        return lambda: bank.ops.linear(x, packed)

    return [one() for _ in range(count)]


def decode_attention(bank: Bank, shape: ModelShape, profile: Profile, *, once: bool) -> Iterator[MicroCase]:
    for context in profile.micro_contexts[:1] if once else profile.micro_contexts:
        for batch in profile.batches[:1] if once else profile.batches:
            kv_bytes = batch * context * shape.kv_heads * shape.head_dim * 2 * bank.itemsize
            q_bytes = 2 * batch * shape.heads * shape.head_dim * bank.itemsize
            yield MicroCase(
                id=f"attention.decode/{shape.name}/B{batch}/ctx{context}", num_bytes=kv_bytes,
                work=Work(kv_bytes + q_bytes, 4.0 * batch * context * shape.heads * shape.head_dim),
                cfg={"B": batch, "context": context, "heads": shape.heads, "kv_heads": shape.kv_heads,
                     "head_dim": shape.head_dim, "kv_bytes": kv_bytes},
                calls=lambda n, b=batch, c=context: attention_calls(bank, shape, n, [1] * b, [c] * b))  # fmt: skip


def prefill_attention(bank: Bank, shape: ModelShape, prefills: Sequence[int]) -> Iterator[MicroCase]:
    for tokens in prefills:
        yield MicroCase(
            id=f"attention.prefill/{shape.name}/T{tokens}",
            num_bytes=tokens * (shape.heads + shape.kv_heads) * shape.head_dim * 2 * bank.itemsize,
            work=Work(tokens * (shape.heads + shape.kv_heads) * shape.head_dim * 2.0 * bank.itemsize,
                      2.0 * tokens * tokens * shape.heads * shape.head_dim),
            cfg={"T": tokens}, calls=lambda n, t=tokens: attention_calls(bank, shape, n, [t], [t]),
            reference=("sdpa", lambda n, t=tokens: sdpa_calls(bank, shape, n, t)))  # fmt: skip


def attention_calls(bank: Bank, shape: ModelShape, count: int, queries: list[int], lens: list[int]) -> list[Call]:
    """The plan is made once a step, for all layers: it is not in the time."""
    def one() -> Call:
        step = PagedStep(bank.device.backend, queries, lens, num_kv_heads=shape.kv_heads, head_dim=shape.head_dim,
                         dtype=bank.dtype, generator=bank.generator)  # fmt: skip
        q, caches, plan = bank.randn(sum(queries), shape.heads, shape.head_dim), step.filled_caches(), None
        step.keys_CKH = step.values_CKH = step.slots_C = torch.empty(0)  # their copies in the caches are what is read
        plan = step.plan(bank.ops, shape.heads)
        return lambda: step.attend(bank.ops, q, caches, plan=plan)

    return [one() for _ in range(count)]


def sdpa_calls(bank: Bank, shape: ModelShape, count: int, tokens: int) -> list[Call]:
    """torch's causal attention over keys and values that lie in order: the best that it chooses here."""
    def one() -> Call:
        q = bank.randn(1, shape.heads, tokens, shape.head_dim)
        k, v = (bank.randn(1, shape.kv_heads, tokens, shape.head_dim) for _ in "kv")
        return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return [one() for _ in range(count)]


def rowwise(bank: Bank, shape: ModelShape, tokens: int) -> Iterator[MicroCase]:
    """Norms, activation, rotation with the cache's write, the token table."""
    D, FFN, item = shape.hidden, shape.ffn, bank.itemsize
    heads, H = shape.heads + 2 * shape.kv_heads, shape.head_dim

    def add_norm() -> Call:
        x, residual, weight = bank.randn(tokens, D), bank.randn(tokens, D), bank.randn(D)
        return lambda: bank.ops.add_rms_norm(x, residual, weight, 1e-6)

    def silu() -> Call:
        x = bank.randn(tokens, 2 * FFN)
        return lambda: bank.ops.silu_mul(x)

    def each(one: Callable[[], Call]) -> Callable[[int], list[Call]]:
        return lambda count: [one() for _ in range(count)]

    for name, calls, moved in (
        ("add_rms_norm", each(add_norm), 4 * tokens * D), ("silu_mul", each(silu), 3 * tokens * FFN),
        ("qkv_rope_write", each(lambda: rope_call(bank, shape, tokens)), 2 * tokens * heads * H),
        ("embedding", lambda count: embedding_calls(bank, shape, count, tokens), 2 * tokens * D),
    ):  # fmt: skip
        yield MicroCase(id=f"{name}/{shape.name}/T{tokens}", work=Work(float(moved * item), 0.0), cfg={"T": tokens},
                        num_bytes=moved * item, calls=calls)  # fmt: skip


def embedding_calls(bank: Bank, shape: ModelShape, count: int, tokens: int) -> list[Call]:
    """Other rows of one table each time."""
    table = bank.randn(shape.vocab, shape.hidden)

    def one() -> Call:
        ids = torch.randint(shape.vocab, (tokens,), generator=bank.generator, device=table.device, dtype=torch.int32)
        return lambda: bank.ops.embedding(ids, table)

    return [one() for _ in range(count)]


def rope_call(bank: Bank, shape: ModelShape, tokens: int) -> Call:
    step = PagedStep(bank.device.backend, [1] * tokens, [5] * tokens, num_kv_heads=shape.kv_heads,
                     head_dim=shape.head_dim, dtype=bank.dtype, generator=bank.generator)  # fmt: skip
    qkv, caches = bank.randn(tokens, (shape.heads + 2 * shape.kv_heads) * shape.head_dim), step.filled_caches()
    positions = torch.full((tokens,), 4, dtype=torch.int32, device=bank.device.torch)
    table, norm = torch.rand(64, shape.head_dim, device=bank.device.torch), bank.randn(shape.head_dim)
    heads = {"num_heads": shape.heads, "num_kv_heads": shape.kv_heads, "head_dim": shape.head_dim}
    return lambda: bank.ops.qkv_rope_write(qkv, positions, table, *caches, step.meta, q_norm_H=norm, k_norm_H=norm,
                                           **heads)  # fmt: skip


SAMPLING = {"greedy": (0.0, 0, 1.0), "temperature": (0.8, 0, 1.0), "top_k_top_p": (0.8, 50, 0.9)}


def sampling(bank: Bank, vocab: int, rows: int) -> Iterator[MicroCase]:
    moved = rows * vocab * 4
    for name, limits in SAMPLING.items():
        yield MicroCase(id=f"sample.{name}/B{rows}/V{vocab}", work=Work(float(moved), 0.0), num_bytes=moved,
                        cfg={"B": rows}, calls=lambda n, at=limits: sample_calls(bank, n, rows, vocab, *at))


def sample_calls(bank: Bank, count: int, rows: int, vocab: int, temperature: float, top_k: int,
                 top_p: float) -> list[Call]:
    device = bank.device.torch

    def one() -> Call:
        logits = torch.empty(rows, vocab, device=device).normal_(0, 3, generator=bank.generator)
        columns = [torch.full((rows,), value, device=device) for value in (temperature, top_k, top_p, 0.0)]
        columns[1] = columns[1].int()
        uniform = torch.rand(rows, device=device, generator=bank.generator)
        return lambda: bank.ops.sample(logits, *columns, uniform)

    return [one() for _ in range(count)]


