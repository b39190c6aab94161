"""What section `micro` measures of the KV cache: attention over each form of it, and the ways of its blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from backends.reference.kv_codes import QUANTISED, row_width
from benchmarks.gpu.bank import Bank, MicroCase, each
from benchmarks.gpu.device import Call
from benchmarks.gpu.paged import PagedStep
from benchmarks.gpu.profile import Profile
from benchmarks.gpu.roofline import Work
from benchmarks.gpu.shapes import ModelShape

MOVED_BLOCKS = 8  # between device and host memory, of all layers
COPIED_BLOCKS = 16
FORMATS = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def attention_cases(bank: Bank, shape: ModelShape, profile: Profile,
                    kv_dtype: torch.dtype | None) -> Iterator[MicroCase]:
    """kv_dtype: of the cache, where it is not that of the rest."""
    for context in profile.micro_contexts:
        for batch in profile.batches:
            yield decode_case(bank, shape, batch, context, kv_dtype)
    for tokens in profile.prefills:
        yield prefill_case(bank, shape, tokens, kv_dtype)


def form(bank: Bank, kv_dtype: torch.dtype | None) -> tuple[str, dict[str, Any]]:
    """What follows an id's first word for a cache of this dtype, and what its case says."""
    if kv_dtype is None:
        return "", {}
    format = QUANTISED[kv_dtype]
    why = "" if kv_dtype in bank.backend.kv_dtypes else f"not on this device: it has no KV cache of {format}"
    return f".{format}", {"absent": why, "may_refuse": True}


def position_bytes(bank: Bank, shape: ModelShape, kv_dtype: torch.dtype | None) -> int:
    """Of the keys and values of one token of one layer."""
    dtype = kv_dtype or bank.dtype
    return 2 * shape.kv_heads * row_width(shape.head_dim, dtype) * dtype.itemsize


def decode_case(bank: Bank, shape: ModelShape, batch: int, context: int, kv_dtype: torch.dtype | None) -> MicroCase:
    kv_bytes = batch * context * position_bytes(bank, shape, kv_dtype)
    q_bytes = 2 * batch * shape.heads * shape.head_dim * bank.itemsize
    suffix, facts = form(bank, kv_dtype)
    return MicroCase(
        id=f"attention.decode{suffix}/{shape.name}/B{batch}/ctx{context}", num_bytes=kv_bytes,
        work=Work(kv_bytes + q_bytes, 4.0 * batch * context * shape.heads * shape.head_dim),
        cfg={"B": batch, "context": context, "heads": shape.heads, "kv_heads": shape.kv_heads,
             "head_dim": shape.head_dim, "kv_bytes": kv_bytes},
        calls=lambda n: attention_calls(bank, shape, n, [1] * batch, [context] * batch, kv_dtype), **facts)  # fmt: skip


def prefill_case(bank: Bank, shape: ModelShape, tokens: int, kv_dtype: torch.dtype | None) -> MicroCase:
    qo_bytes = 2 * tokens * shape.heads * shape.head_dim * bank.itemsize
    num_bytes = tokens * position_bytes(bank, shape, kv_dtype) + qo_bytes
    suffix, facts = form(bank, kv_dtype)
    return MicroCase(
        id=f"attention.prefill{suffix}/{shape.name}/T{tokens}", num_bytes=num_bytes,
        work=Work(float(num_bytes), 2.0 * tokens * tokens * shape.heads * shape.head_dim), cfg={"T": tokens},
        calls=lambda n: attention_calls(bank, shape, n, [tokens], [tokens], kv_dtype),
        reference=("sdpa", lambda n: sdpa_calls(bank, shape, n, tokens)), **facts)  # fmt: skip


def attention_calls(bank: Bank, shape: ModelShape, count: int, queries: list[int], lens: list[int],
                    kv_dtype: torch.dtype | None = None) -> list[Call]:
    """The plan is made once a step, for all layers: it is not in the time."""
    def one() -> Call:
        step = PagedStep(bank.backend, queries, lens, num_kv_heads=shape.kv_heads, head_dim=shape.head_dim,
                         dtype=bank.dtype, generator=bank.generator, kv_dtype=kv_dtype)  # fmt: skip
        q, caches = bank.randn(sum(queries), shape.heads, shape.head_dim), step.filled_caches()
        step.keys_CKH = step.values_CKH = step.slots_C = torch.empty(0)  # their copies in the caches are what is read
        plan = step.plan(bank.ops, shape.heads)
        return lambda: step.attend(bank.ops, q, caches, plan=plan)

    return each(one)(count)


def sdpa_calls(bank: Bank, shape: ModelShape, count: int, tokens: int) -> list[Call]:
    """torch's causal attention over keys and values that lie in order: the best that it chooses here."""
    def one() -> Call:
        q = bank.randn(1, shape.heads, tokens, shape.head_dim)
        k, v = (bank.randn(1, shape.kv_heads, tokens, shape.head_dim) for _ in "kv")
        return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return each(one)(count)


def copy_case(bank: Bank, shape: ModelShape) -> MicroCase:
    """What a shared last block costs when it is written to."""
    block_size = bank.backend.default_block_size
    num_bytes = COPIED_BLOCKS * block_size * position_bytes(bank, shape, None) // 2

    def one() -> Call:
        cache = bank.randn(*bank.backend.kv_cache_shape(2 * COPIED_BLOCKS, block_size, shape.kv_heads, shape.head_dim))
        src = torch.arange(COPIED_BLOCKS, device=cache.device)
        return lambda: bank.ops.copy_blocks(cache, src, src + COPIED_BLOCKS)

    return MicroCase(id=f"copy_blocks/{shape.name}/{COPIED_BLOCKS}", work=Work(2.0 * num_bytes, 0.0), calls=each(one),
                     num_bytes=2 * num_bytes, cfg={"blocks": COPIED_BLOCKS})  # fmt: skip


def transfer_cases(bank: Bank, shape: ModelShape, num_layers: int) -> Iterator[MicroCase]:
    """Blocks of all layers to the host's tier and back, as `HostMover` moves them: in the cache's own form, and as
    codes; caches of codes as they are."""
    plain = FORMATS[bank.dtype]
    for format, kv_dtype in ((plain, None), ("int8", None), ("fp8", None), *((f, d) for d, f in QUANTISED.items())):
        suffix, facts = form(bank, kv_dtype)
        width = shape.head_dim * bank.itemsize if format == plain else row_width(shape.head_dim, _dtype(format))
        layer_bytes = 2 * MOVED_BLOCKS * bank.backend.default_block_size * shape.kv_heads * width
        for way, link in (("export", "d2h"), ("import", "h2d")):
            yield MicroCase(
                id=f"{way}_blocks{suffix}/{shape.name}/{format}", work=Work(float(layer_bytes * num_layers), 0.0),
                num_bytes=layer_bytes * num_layers, waited=True, link=link,
                cfg={"blocks": MOVED_BLOCKS, "layers": num_layers, "format": format},
                calls=_mover(bank, shape, num_layers, format, kv_dtype, way), **facts)  # fmt: skip


def _dtype(format: str) -> torch.dtype:
    return next(dtype for dtype, name in QUANTISED.items() if name == format)


def _mover(bank: Bank, shape: ModelShape, num_layers: int, format: str, kv_dtype: torch.dtype | None,
           way: str) -> Callable[[int], list[Call]]:
    def one() -> Call:
        layers = _layers(bank, shape, num_layers, kv_dtype)
        part = bank.ops.stored_bytes(layers[0], format=format)
        store = bank.host_memory(MOVED_BLOCKS * num_layers * part).view(MOVED_BLOCKS, -1)
        blocks = torch.arange(MOVED_BLOCKS)
        move = bank.ops.export_blocks if way == "export" else bank.ops.import_blocks
        for i, caches in enumerate(layers):  # so that what is imported are numbers
            bank.ops.export_blocks(caches, blocks, store[:, i * part : (i + 1) * part], blocks, format=format)
        bank.backend.synchronize_copies()

        def run() -> None:
            for i, caches in enumerate(layers):
                move(caches, blocks, store[:, i * part : (i + 1) * part], blocks, format=format)

        return run

    return lambda count: [one()]  # what crosses the link is in no cache


def _layers(bank: Bank, shape: ModelShape, num_layers: int,
            kv_dtype: torch.dtype | None) -> Sequence[tuple[Tensor, Tensor]]:
    step = PagedStep(bank.backend, [1], [MOVED_BLOCKS * bank.backend.default_block_size], num_kv_heads=shape.kv_heads,
                     head_dim=shape.head_dim, dtype=bank.dtype, generator=bank.generator, kv_dtype=kv_dtype,
                     )  # fmt: skip
    filled = step.filled_caches()
    return [(filled[0].clone(), filled[1].clone()) for _ in range(num_layers)]
