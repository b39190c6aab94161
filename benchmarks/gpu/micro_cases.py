"""What section `micro` measures: operators at sizes that models have, with the least bytes and operations of each."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from backends.reference.kv_codes import QUANTISED
from benchmarks.gpu import micro_experts
from benchmarks.gpu.bank import Bank, MicroCase, each
from benchmarks.gpu.device import Call, Device
from benchmarks.gpu.micro_kv import attention_cases, copy_case, transfer_cases
from benchmarks.gpu.micro_latent import latent_cases
from benchmarks.gpu.micro_lora import lora_cases, pack_case
from benchmarks.gpu.micro_step import step_cases
from benchmarks.gpu.paged import PagedStep
from benchmarks.gpu.profile import Profile
from benchmarks.gpu.roofline import Work
from benchmarks.gpu.shapes import SHAPES, ModelShape, expert_layer

QUANTIZATIONS = (None, "int8", "fp8", "w8a8")
FEW_ROWS = 64
PACKED = "gate_up"  # whose quantisation is measured


def all_cases(device: Device, profile: Profile, *, once: bool = False) -> Iterator[MicroCase]:
    """The most valuable first: a deadline costs the last ones. once: no more than compiles each kernel."""
    bank, shapes = Bank(device), [SHAPES[name] for name in profile.models]
    largest = shapes[-1]
    for shape in shapes:
        yield from attention_cases(bank, shape, profile, None)
    for rows in profile.batches:
        yield from step_cases(bank, largest.vocab, rows)
    for kv_dtype in QUANTISED:
        yield from attention_cases(bank, largest, profile, kv_dtype)
    for shape in reversed(shapes):
        for tokens in profile.micro_tokens:
            yield from linears(bank, shape, tokens)
            yield from rowwise(bank, shape, tokens)
    experts = expert_layer(large=device.is_cuda)
    for tokens in (*profile.micro_tokens, profile.prefills[-1]):
        yield from micro_experts.expert_cases(bank, experts, tokens)
    yield from latent_cases(bank, profile)
    for tokens in (*profile.micro_tokens, profile.prefills[-1]):
        yield from lora_cases(bank, largest, tokens)
    yield from transfer_cases(bank, largest, 1 if once else largest.layers)
    yield copy_case(bank, largest)
    yield pack_case(bank, largest)
    yield micro_experts.pack_case(bank, experts)
    yield micro_experts.pack_case(bank, experts, "pack_gated_experts")
    yield from pack_linears(bank, largest)


def matrices(shape: ModelShape) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of a layer's products and of lm_head."""
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return {"qkv": (q + 2 * kv, shape.hidden), "o": (shape.hidden, q), "gate_up": (2 * shape.ffn, shape.hidden),
            "down": (shape.hidden, shape.ffn), "lm_head": (shape.vocab, shape.hidden)}  # fmt: skip


def linears(bank: Bank, shape: ModelShape, tokens: int) -> Iterator[MicroCase]:
    for name, (Y, X) in matrices(shape).items():
        if name == "lm_head" and tokens > 256:
            continue
        for quantization in QUANTIZATIONS:
            if quantization is not None and name in ("o", "lm_head"):
                continue  # the others show the same
            weight_bytes = Y * X * (1 if quantization else bank.itemsize)
            moved = weight_bytes + tokens * (X + Y) * bank.itemsize
            yield MicroCase(
                id=f"linear/{shape.name}/{name}/{quantization or 'plain'}/T{tokens}", num_bytes=weight_bytes,
                work=Work(moved, 2.0 * tokens * X * Y), cfg={"T": tokens, "Y": Y, "X": X, "quantization": quantization},
                calls=each(partial(linear_call, bank, tokens, Y, X, quantization)),
                may_refuse=quantization is not None, rate=rate_of(quantization, tokens))  # fmt: skip


def rate_of(quantization: str | None, tokens: int) -> str:
    """Few rows are multiplied in 16 bits by a weight of fp8."""
    return {"w8a8": "rate_int8", "fp8": "rate_fp8" if tokens > FEW_ROWS else "rate"}.get(quantization or "", "rate")


def linear_call(bank: Bank, tokens: int, Y: int, X: int, quantization: str | None) -> Call:
    packed = bank.ops.pack_linear(bank.randn(Y, X), quantization=quantization)
    x = bank.randn(tokens, X)
    return lambda: bank.ops.linear(x, packed)


def pack_linears(bank: Bank, shape: ModelShape) -> Iterator[MicroCase]:
    """What quantising a weight costs while it is loaded."""
    Y, X = matrices(shape)[PACKED]
    for quantization in ("int8", "fp8"):
        def one(quantization: str = quantization) -> Call:
            weight = bank.randn(Y, X)
            return lambda: bank.ops.pack_linear(weight, quantization=quantization)

        yield MicroCase(id=f"pack_linear/{shape.name}/{PACKED}/{quantization}", waited=True, calls=each(one),
                        work=Work(Y * X * (bank.itemsize + 1.0), 0.0), num_bytes=Y * X * bank.itemsize,
                        cfg={"Y": Y, "X": X, "quantization": quantization}, may_refuse=True)  # fmt: skip


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

    def norm() -> Call:
        x, weight = bank.randn(tokens, D), bank.randn(D)
        return lambda: bank.ops.rms_norm(x, weight, 1e-6)

    for name, calls, moved in (
        ("rms_norm", each(norm), 2 * tokens * D), ("add_rms_norm", each(add_norm), 4 * tokens * D),
        ("silu_mul", each(silu), 3 * tokens * FFN),
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
    return lambda: bank.ops.qkv_rope_write(qkv, positions, table, *caches, step.meta, num_heads=shape.heads,
                                           num_kv_heads=shape.kv_heads, head_dim=shape.head_dim, q_norm_H=norm,
                                           k_norm_H=norm)  # fmt: skip
