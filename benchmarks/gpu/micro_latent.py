"""What section `micro` measures of latent attention, at the widths of DeepSeek V2-Lite."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.gpu.bank import Bank, MicroCase, each
from benchmarks.gpu.device import Call
from benchmarks.gpu.op_cases_latent import V2_LITE
from benchmarks.gpu.paged import PagedStep
from benchmarks.gpu.profile import Profile
from benchmarks.gpu.roofline import Work

N, L, R, D, V = V2_LITE.heads, V2_LITE.L, V2_LITE.R, V2_LITE.D, V2_LITE.V


def latent_cases(bank: Bank, profile: Profile) -> Iterator[MicroCase]:
    for context in profile.micro_contexts:
        for batch in profile.batches:
            yield attention_case(bank, f"decode/V2-Lite/B{batch}/ctx{context}", [1] * batch, [context] * batch)
    for tokens in profile.prefills:
        yield attention_case(bank, f"prefill/V2-Lite/T{tokens}", [tokens], [tokens], known=True)
        yield attention_case(bank, f"absorbed/V2-Lite/T{tokens}", [tokens], [tokens])
    for tokens in profile.micro_tokens:
        yield rope_write_case(bank, tokens)


def attention_case(bank: Bank, name: str, queries: list[int], lens: list[int], *, known: bool = False) -> MicroCase:
    """known: the lengths are on the host, so that the device may expand; the work is then that of the form that is
    less, else that of the absorbed one."""
    kept_bytes, up_bytes = sum(lens) * (L + R) * bank.itemsize, N * (D + V) * L * bank.itemsize
    tokens_bytes = sum(queries) * N * (D + R + V) * bank.itemsize
    pairs = sum(q * n - q * (q - 1) / 2 for q, n in zip(queries, lens))
    products = pairs * (2 * L + R) + sum(queries) * (D + V) * L
    if known:
        products = min(products, pairs * (D + R + V) + sum(lens) * (D + V) * L)
    work = Work(float(kept_bytes + up_bytes + tokens_bytes), 2.0 * N * products)
    return MicroCase(id=f"latent_attention.{name}", num_bytes=kept_bytes + up_bytes, work=work,
                     cfg={"queries": sum(queries), "kept_bytes": kept_bytes},
                     calls=each(partial(attention_call, bank, queries, lens, known)))  # fmt: skip


def step_of(bank: Bank, queries: list[int], lens: list[int]) -> PagedStep:
    return PagedStep(bank.backend, queries, lens, num_kv_heads=1, head_dim=L + R, dtype=bank.dtype,
                     generator=bank.generator)


def attention_call(bank: Bank, queries: list[int], lens: list[int], known: bool) -> Call:
    """What is chosen by the lengths is kept in the plan by the first call, before any is captured."""
    step = step_of(bank, queries, lens)
    step.meta.plan = step.plan(bank.ops, N)
    if not known:
        step.meta.host = None
    q, up, cache = bank.randn(sum(queries), N, D + R), bank.randn(N, D + V, L), step.filled_caches()[1]
    step.keys_CKH = step.values_CKH = step.slots_C = torch.empty(0)  # their copies in the cache are what is read
    return lambda: bank.ops.latent_attention(q, up, cache, step.meta, scale=0.1)


def rope_write_case(bank: Bank, tokens: int) -> MicroCase:
    num_bytes = tokens * (2 * (L + R) + 2 * N * R) * bank.itemsize

    def one() -> Call:
        step = step_of(bank, [tokens], [tokens])
        latent, q, cache = bank.randn(tokens, L + R), bank.randn(tokens, N, D + R), step.filled_caches()[1]
        positions, norm, angles = bank.randint(64, tokens), bank.randn(L), bank.randn(64, R).float()
        return lambda: bank.ops.latent_rope_write(latent, q, positions, angles, cache, step.meta, norm_weight_L=norm,
                                                  eps=1e-6, interleaved=True)

    return MicroCase(id=f"latent_rope_write/V2-Lite/T{tokens}", num_bytes=num_bytes, work=Work(float(num_bytes), 0.0),
                     cfg={"T": tokens}, calls=each(one))
