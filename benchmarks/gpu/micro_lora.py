"""What section `micro` measures of low-rank adapters: beside the projections of queries, keys and values."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.gpu.bank import Bank, MicroCase, each
from benchmarks.gpu.device import Call
from benchmarks.gpu.roofline import Work
from benchmarks.gpu.shapes import ModelShape

RANK, FEW, MANY, MANY_DRY = 16, 1, 32, 4  # rank and numbers of adapters
CAPTURED_TOKENS = 256  # up to which a step may lie in a graph, where the host does not say which adapters occur


def lora_cases(bank: Bank, shape: ModelShape, tokens: int) -> Iterator[MicroCase]:
    """Tokens by turns of one adapter after the other."""
    X, parts = shape.hidden, parts_of(shape)
    Y, item = sum(parts), bank.itemsize
    one_bytes = (len(parts) * RANK * X + Y * RANK) * item
    for slots in (FEW, many(bank)):
        moved = min(slots, tokens) * one_bytes + tokens * ((X + 2 * Y) * item + 4)
        yield MicroCase(id=f"lora_add/{shape.name}/L{slots}/T{tokens}", num_bytes=slots * one_bytes + moved,
                        work=Work(float(moved), 2.0 * tokens * (len(parts) * RANK * X + Y * RANK)),
                        cfg={"T": tokens, "L": slots, "rank": RANK, "parts": parts},
                        calls=each(partial(lora_call, bank, shape, tokens, slots)))  # fmt: skip


def pack_case(bank: Bank, shape: ModelShape) -> MicroCase:
    """When an adapter comes or goes: its layer's matrices are packed anew. They may stay as they lie, so that the least
    is to note which part each output belongs to."""
    (X, parts), slots = (shape.hidden, parts_of(shape)), many(bank)
    num_bytes = slots * (len(parts) * RANK * X + sum(parts) * RANK) * bank.itemsize

    def one() -> Call:
        a, b = matrices(bank, shape, slots)
        return lambda: bank.ops.pack_lora(a, b, parts)

    return MicroCase(id=f"pack_lora/{shape.name}/L{slots}", work=Work(4.0 * sum(parts), 0.0), num_bytes=num_bytes,
                     cfg={"L": slots, "rank": RANK}, waited=True, calls=each(one))


def many(bank: Bank) -> int:
    return MANY if bank.device.is_cuda else MANY_DRY


def parts_of(shape: ModelShape) -> tuple[int, int, int]:
    return shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.kv_heads * shape.head_dim


def matrices(bank: Bank, shape: ModelShape, slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    parts = parts_of(shape)
    return (bank.randn(slots, len(parts) * RANK, shape.hidden) / shape.hidden**0.5,
            bank.randn(slots, sum(parts), RANK) / RANK**0.5)  # fmt: skip


def lora_call(bank: Bank, shape: ModelShape, tokens: int, slots: int) -> Call:
    parts = parts_of(shape)
    packed = bank.ops.pack_lora(*matrices(bank, shape, slots), parts)
    x, y = bank.randn(tokens, shape.hidden), bank.randn(tokens, sum(parts))
    slots_T = (torch.arange(tokens, device=x.device) % slots + 1).int()
    captured = bank.device.is_cuda and tokens <= CAPTURED_TOKENS
    present = None if captured else list(range(1, min(slots, tokens) + 1))
    return lambda: bank.ops.lora_add(y, x, packed, slots_T, present)
