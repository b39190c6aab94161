"""The operators of CUDA with the shapes, dtypes and layouts that they are compiled for ahead of time.

Each function yields (a name, a call); `aot.py` makes the calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
QUANTISED = {"int8": (torch.int8, 4), "fp8": (torch.float8_e4m3fn, 1)}  # dtypes of caches, and the bytes of a scale


def norm_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    from cuda_ops.norm import add_rms_norm, rms_norm

    for D, dtype in ((1024, BF16), (2048, BF16), (4096, BF16), (5120, FP32), (8192, BF16)):
        x, weight = torch.empty(4, D, dtype=dtype), torch.empty(D, dtype=dtype)
        yield f"D{D} {dtype}", lambda x=x, weight=weight: (rms_norm(x, weight, 1e-6), add_rms_norm(x, x, weight, 1e-6))


def silu_mul_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    from cuda_ops.activation import silu_mul

    for dtype in (BF16, FP32):
        yield str(dtype), lambda dtype=dtype: silu_mul(torch.empty(4, 2 * 14336, dtype=dtype))


def qkv_rope_write_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    from cuda_ops.rotary import qkv_rope_write

    for H, dtype, normed in ((64, BF16, False), (128, BF16, False), (128, BF16, True), (128, FP32, True),
                             (256, BF16, False)):  # fmt: skip
        places = torch.zeros(16, dtype=torch.int32)
        norms = dict.fromkeys(("q_norm_H", "k_norm_H"), torch.empty(H, dtype=dtype) if normed else None)
        for format, (codes, scale_bytes) in {"": (dtype, 0), **QUANTISED}.items():
            cache = torch.empty(4, 8, 128, H + scale_bytes, dtype=codes)
            yield f"H{H} {dtype}{' normed' * normed}{f' {format} KV' if format else ''}", partial(
                qkv_rope_write, torch.empty(16, 48 * H, dtype=dtype), places, torch.empty(64, H), cache, cache, places,
                num_heads=32, num_kv_heads=8, head_dim=H, **norms)  # fmt: skip


def attention_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    from cuda_ops import attention as ops

    heads = {64: (32, 8), 128: (32, 8), 256: (8, 4)}
    shapes = [(H, BF16, 128, heads[H]) for H in heads] + [(64, FP32, 128, (32, 8)), (128, FP32, 128, (32, 8)),
              (256, FP32, 128, (8, 4)), (128, FP16, 128, (32, 8)), (128, BF16, 16, (16, 8)), (128, BF16, 128, (7, 1)),
              (80, BF16, 128, (32, 32))]  # fmt: skip
    modes = [(False, None), (True, None), (False, 4096)]
    for H, dtype, P, (N, K) in shapes:
        for contiguous, window in modes if (H, dtype, P, N) == (128, BF16, 128, 32) else modes[:1]:
            name = f"H{H} {dtype} P{P} N{N} K{K}{' base' * contiguous}{' window' * bool(window)}"
            q, cache = torch.empty(64, N, H, dtype=dtype), torch.empty(3, K, P, H, dtype=dtype)
            yield name, partial(_attend, ops, q, cache, contiguous, window)
    for H, dtype, P, (N, K), format in _quantised_shapes():
        codes, scale_bytes = QUANTISED[format]
        q, cache = torch.empty(64, N, H, dtype=dtype), torch.empty(3, K, P, H + scale_bytes, dtype=codes)
        for contiguous, window in modes if (H, dtype, P, N, format) == (128, BF16, 128, 32, "int8") else modes[:1]:
            name = f"H{H} {dtype} P{P} N{N} K{K}{' base' * contiguous}{' window' * bool(window)} {format} KV"
            yield name, partial(_attend, ops, q, cache, contiguous, window)


def _quantised_shapes() -> Iterator[tuple[int, torch.dtype, int, tuple[int, int], str]]:
    for format in QUANTISED:
        for H in (64, 128, 256):
            yield H, BF16, 128, (8, 4) if H == 256 else (32, 8), format
        yield 128, BF16, 16, (16, 8), format
    yield from ((128, FP16, 128, (32, 8), "fp8"), (128, FP32, 128, (32, 8), "int8"), (128, BF16, 128, (7, 1), "fp8"),
                (80, BF16, 128, (32, 32), "int8"))  # fmt: skip


def _attend(ops: Any, q: torch.Tensor, cache: torch.Tensor, contiguous: bool, window: int | None) -> None:
    ids = torch.zeros(64, dtype=torch.int32)
    batch = ops.Batch(query_start_S1=torch.zeros(65, dtype=torch.int32), seq_lens_S=ids,
                      block_table_SM=torch.zeros(64, 0 if contiguous else 48, dtype=torch.int32), num_tokens=64,
                      kv_base_S=ids if contiguous else None, max_query_len=64)  # fmt: skip
    plan = ops.plan(batch, ops.Shape.of(q, cache), q, window)
    ops.attention(q, cache, cache, batch, plan, scale=0.1)


def latent_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """DeepSeek's widths: V2-Lite's heads, V2's and V3's, and a rank's; a token, its drafts, and a chunk."""
    for N, dtype, P, contiguous in ((16, BF16, 128, False), (16, BF16, 128, True), (32, BF16, 128, False),
                                    (128, BF16, 128, False), (16, FP16, 128, False), (16, FP32, 128, False),
                                    (16, BF16, 16, False)):  # fmt: skip
        for query_len in (1, 4, 64) if (dtype, P, contiguous) == (BF16, 128, False) else (1, 64):
            name = f"N{N} Q{query_len} {dtype} P{P}{' base' * contiguous}"
            forms = {"": (dtype, 0), **(QUANTISED if N != 32 and query_len != 4 else {})}
            for format, (codes, scale_bytes) in forms.items():
                cache = torch.empty(3, 1, P, 576 + scale_bytes, dtype=codes)
                yield f"{name}{f' {format} KV' if format else ''}", partial(
                    _attend_latents, cache, N, dtype, query_len, contiguous)  # fmt: skip


def _attend_latents(cache: torch.Tensor, N: int, dtype: torch.dtype, query_len: int, contiguous: bool) -> None:
    from cuda_ops.attention import Batch
    from cuda_ops.latent import latent_attention

    ids = torch.zeros(8, dtype=torch.int32)
    batch = Batch(query_start_S1=torch.zeros(9, dtype=torch.int32), seq_lens_S=ids, num_tokens=8 * query_len,
                  block_table_SM=torch.zeros(8, 0 if contiguous else 48, dtype=torch.int32),
                  kv_base_S=ids if contiguous else None, max_query_len=query_len)  # fmt: skip
    q, up = torch.empty(8 * query_len, N, 192, dtype=dtype), torch.empty(N, 256, 512, dtype=dtype)
    latent_attention(q, up, cache, batch, scale=0.1)


def latent_expanded_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """DeepSeek's widths with V3's heads, Kimi-K2's or half of V3's, V2-Lite's; GLM-4.7-Flash's."""
    for D, V, heads in ((128, 128, (128, 64, 16)), (192, 256, (20,))):
        for N in heads:
            for dtype, P, contiguous in ((BF16, 128, False), (BF16, 128, True), (FP16, 128, False), (FP32, 128, False),
                                         (BF16, 16, False)):  # fmt: skip
                for format, (codes, scale_bytes) in {"": (dtype, 0), **QUANTISED}.items():
                    cache = torch.empty(3, 1, P, 576 + scale_bytes, dtype=codes)
                    yield (f"N{N} {D}+64/{V} {dtype}{f' pages of {P}' if P < 128 else ''}{' base' * contiguous}"
                           f"{f' from {format}' if format else ''}",
                           partial(_expand, cache, N, D, V, dtype, contiguous))  # fmt: skip


def _expand(cache: torch.Tensor, N: int, D: int, V: int, dtype: torch.dtype, contiguous: bool) -> None:
    from cuda_ops import latent_expanded as ops
    from cuda_ops.attention import Batch

    ids = torch.zeros(2, dtype=torch.int32)
    batch = Batch(query_start_S1=torch.zeros(3, dtype=torch.int32), seq_lens_S=ids, num_tokens=64, max_query_len=64,
                  block_table_SM=torch.zeros(2, 0 if contiguous else 48, dtype=torch.int32),
                  kv_base_S=ids if contiguous else None)  # fmt: skip
    q, up = torch.zeros(64, N, D + 64, dtype=dtype), torch.zeros(N, D + V, 512, dtype=dtype)
    chunk, widths = ops.Chunk(sequence=0, first_row=0, num_queries=64, seq_len=96), ops.Widths.of(q, up, cache)
    run, = ops.plan([chunk], widths, q, num_bytes=2**29)
    ops.attend(q, up, cache, batch, run, torch.empty(64, N, V, dtype=dtype), scale=0.1)


def latent_rope_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    from cuda_ops.latent_rope import latent_rope_write

    places = torch.zeros(16, dtype=torch.int32)
    for dtype, interleaved in ((BF16, True), (BF16, False), (FP32, True)):
        latent, q = torch.empty(16, 576, dtype=dtype), torch.empty(16, 128, 192, dtype=dtype)
        for format, (codes, scale_bytes) in {"": (dtype, 0), **QUANTISED}.items():
            cache = torch.empty(4, 1, 128, 576 + scale_bytes, dtype=codes)
            yield f"{dtype}{' pairs' * interleaved}{f' {format} KV' if format else ''}", partial(
                latent_rope_write, latent, q, places, torch.empty(64, 64), cache, places,
                norm_weight_L=torch.empty(512, dtype=dtype), eps=1e-6, interleaved=interleaved)  # fmt: skip


def sampling_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    from cuda_ops.sampling import argmax, sample

    logits, column = torch.empty(4, 151_936), torch.zeros(4)
    yield "V151936", lambda: (argmax(logits),
                              sample(logits, column, torch.zeros(4, dtype=torch.int32), column, column, column))


def logits_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    from cuda_ops.logits import apply_token_bitmask, penalise

    logits, rows, starts = torch.empty(4, 151_936), torch.zeros(4, dtype=torch.int64), torch.zeros(5, dtype=torch.int32)
    factors = torch.ones(4), *(torch.zeros(4, dtype=torch.float64) for _ in range(2))
    yield "V151936", lambda: (penalise(logits, rows, torch.zeros(99, dtype=torch.int32), starts, starts, *factors),
                              apply_token_bitmask(logits, torch.zeros(4, 4748, dtype=torch.int32), rows))


def kv_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    from cuda_ops.kv import copy_blocks, export_blocks, import_blocks, stored_bytes

    ids = torch.zeros(4, dtype=torch.int64)
    for dtype in (BF16, FP32):
        cache = torch.zeros(4, 8, 128, 128, dtype=dtype)
        yield f"copy {dtype}", lambda cache=cache: copy_blocks(cache, ids, ids)
        for format in ("int8", "fp8"):
            store = torch.zeros(4, stored_bytes((cache, cache), format=format), dtype=torch.uint8)
            yield f"{format} {dtype}", lambda c=cache, s=store, f=format: (
                export_blocks((c, c), ids, s, ids, format=f), import_blocks((c, c), ids, s, ids, format=f))  # fmt: skip
    codes = torch.zeros(4, 8, 128, 129, dtype=torch.float8_e4m3fn)
    yield "copy fp8 KV", lambda: copy_blocks(codes, ids, ids)


def linear_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    from cuda_ops.linear import dequantise, linear_bytes, linear_w8a8, quantise_rows, rescale

    for codes in (torch.int8, torch.float8_e4m3fn):
        weight = torch.zeros(4096, 4096, dtype=torch.int8).view(codes)
        for rows, dtype in ((16, BF16), (64, BF16), (64, FP16), (64, FP32)):
            x, scale, bias = torch.empty(rows, 4096, dtype=dtype), torch.empty(4096), torch.empty(4096, dtype=dtype)
            yield f"{codes} T{rows} {dtype}", partial(linear_bytes, x, weight, scale, bias)
    for run, rows, dtype in ((128, 16, BF16), (128, 64, BF16), (128, 64, FP32), (40, 16, BF16), (40, 64, FP16)):
        x, scale = torch.empty(rows, 4096, dtype=dtype), torch.empty(-(-4096 // run), 4096)
        yield f"fp8 runs of {run} T{rows} {dtype}", partial(linear_bytes, x, weight, scale, None, run=run)
        yield f"runs of {run} {dtype}", partial(dequantise, weight, scale, run, dtype)
    yield str(BF16), lambda: quantise_rows(torch.empty(4, 4096, dtype=BF16))
    weight, scale = torch.zeros(4096, 4096, dtype=torch.int8), torch.empty(4096)
    for rows, dtype in ((16, BF16), (64, BF16), (64, FP32)):
        x, bias = torch.empty(rows, 4096, dtype=dtype), torch.empty(4096, dtype=dtype)
        yield f"w8a8 T{rows} {dtype}", partial(linear_w8a8, x, weight, scale, bias)
        yield f"sums {dtype}", partial(rescale, torch.zeros(rows, 4096, dtype=torch.int32), scale, scale, bias, dtype)


def feed_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    from cuda_ops.feed import feed_tokens

    ids = torch.zeros(64, dtype=torch.int32)
    yield "T64", lambda: feed_tokens(ids, ids, torch.zeros(64, dtype=torch.int64))


def lora_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    from cuda_ops.lora import lora_add, pack_lora

    slots = torch.zeros(4, dtype=torch.int32)
    for rank, parts, dtype in ((16, (4096, 1024, 1024), BF16), (64, (12288, 12288), BF16), (8, (4096,), FP32)):
        a = torch.empty(2, len(parts) * rank, 4096, dtype=dtype)
        packed = pack_lora(a, torch.empty(2, sum(parts), rank, dtype=dtype), parts)
        x, y = torch.empty(4, 4096, dtype=dtype), torch.empty(4, sum(parts), dtype=dtype)
        yield f"R{rank} {len(parts)} parts {dtype}", partial(lora_add, y, x, packed, slots)


def experts_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Experts of Qwen3-30B-A3B, and the routers of it, of DeepSeek-V3 and of a shared expert."""
    from cuda_ops import experts as ops

    def rule(K: int, *, sigmoid: bool, groups: int = 1) -> Any:
        return SimpleNamespace(num_chosen=K, sigmoid=sigmoid, num_groups=groups, num_kept_groups=-(-groups // 2),
                               summed_per_group=2, renormalise=K > 1, scale=1.0)

    ids = torch.zeros(16, 8, dtype=torch.int32)
    rules = {128: rule(8, sigmoid=False), 256: rule(8, sigmoid=True, groups=8), 1: rule(1, sigmoid=True)}
    for E, routed in rules.items():
        bias = torch.empty(E) if E == 256 else None
        yield f"E{E}", partial(ops.route, torch.empty(4, E, dtype=BF16), routed, bias)
    yield "E128", lambda: ops.sort_rows(ids, 128)
    for dtype in (BF16, FP32):
        y, weights = torch.empty(128, 2048, dtype=dtype), torch.empty(16, 8)
        yield str(dtype), partial(ops.combine, y, weights, ops.RowOrder(ids.flatten(), ids, ids, 16))
    fp8 = torch.float8_e4m3fn
    for codes, is_w8a8, run, dtype, sizes in (
        (None, False, 0, BF16, (16, 64, 128)), (None, False, 0, FP32, (16,)),
        (torch.int8, False, 0, BF16, (16, 64, 128)), (torch.int8, False, 0, FP32, (16,)),
        (fp8, False, 0, BF16, (16, 64, 128)), (fp8, False, 0, FP16, (16,)),
        (fp8, False, 128, BF16, (16, 64, 128)), (fp8, False, 128, FP16, (16,)), (fp8, False, 40, BF16, (16, 128)),
        (torch.int8, True, 0, BF16, (16, 64, 128)),
    ):  # fmt: skip
        weight = torch.zeros(1536, 2048, dtype=codes or dtype)
        one = SimpleNamespace(weight_YX=weight, scale_Y=torch.empty(1536) if codes else None, dynamic=is_w8a8, nbytes=0)
        packed = ops.ExpertWeights([one] * 8, run)
        for rows in sizes:
            order = ops.RowOrder(ids.flatten(), ids, torch.zeros(3, 4, dtype=torch.int32), rows)
            for from_tokens in (True, False) if codes is None and rows == 16 else (True,):
                kind = f"{'w8a8' if is_w8a8 else codes}{f' runs of {run}' if run else ''}"
                yield f"{kind} R{rows} {dtype}{' tokens' * from_tokens}", partial(
                    ops.grouped_linear, torch.empty(128, 2048, dtype=dtype), packed, order, from_tokens=from_tokens)


OPERATORS = {
    "norm": norm_cases, "silu_mul": silu_mul_cases, "qkv_rope_write": qkv_rope_write_cases,
    "attention": attention_cases, "latent": latent_cases, "latent_expanded": latent_expanded_cases,
    "latent_rope": latent_rope_cases, "sampling": sampling_cases, "logits": logits_cases, "kv": kv_cases,
    "linear": linear_cases, "feed": feed_cases, "lora": lora_cases, "experts": experts_cases,
}  # fmt: skip
