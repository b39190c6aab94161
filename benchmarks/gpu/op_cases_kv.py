"""Cases of the operators over the KV cache; see `op_cases.py`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from backends.reference.kv_codes import QUANTISED
from benchmarks.gpu.op_cases import TOLERANCE, Cases, Check, World, later, norm_truth, short
from benchmarks.gpu.paged import PagedStep, numbers_BKPH

GROUPS, HEAD_DIMS = (1, 2, 4, 5, 7, 8, 16), (64, 128, 192, 256, 80)
LONGEST_CHUNK = 300
# Relative errors of the stored forms, where they do not hold the cache's numbers exactly.
STORED = {"fp32": 0.0, "bf16": 5e-3, "fp16": 1e-3, "int8": 1.5e-2, "fp8": 5e-2}

# Of what a quantised cache gives back, by the bytes of a number of the compute dtype: some codes may be the next ones.
NEXT_CODES = {torch.int8: {4: 2e-3, 2: 8e-3}, torch.float8_e4m3fn: {4: 5e-3, 2: 2.5e-2}}


def absent_caches(world: World) -> Iterator[Check]:
    """Of one byte a number, which this backend does not have."""
    for dtype, format in QUANTISED.items():
        if dtype not in world.backend.kv_dtypes:
            yield Check(name=format, absent=f"the backend has no KV cache of {format}")


def lengths(world: World, kind: str, block_size: int) -> tuple[list[int], list[int]]:
    """Query and sequence lengths: ends of blocks, one long sequence among short ones, whatever chance brings."""
    rng, P, longest = world.rng, block_size, world.longest
    ends = [1, P - 1, P, P + 1, 2 * P, 3 * P + 1]
    if kind == "decode":
        seq_lens = [*rng.sample(ends, 3), *(rng.randint(1, min(longest, 3000)) for _ in range(rng.randint(0, 6)))]
        return [1] * len(seq_lens), [max(1, n) for n in seq_lens]
    if kind == "long":
        seq_lens = [1, longest, 2, longest - 1, 1, 1]
        return [1] * len(seq_lens), seq_lens
    query_lens = [1, *(rng.randint(1, min(longest, LONGEST_CHUNK)) for _ in range(3))]
    if kind == "prefill":
        return query_lens, list(query_lens)
    if kind == "idle":
        query_lens[1] = 0
    return query_lens, [n + rng.choice((0, 1, P, rng.randint(0, min(longest, 2000)))) or 1 for n in query_lens]


def random_step(world: World, i: int, kv_dtype: torch.dtype | None = None) -> tuple[PagedStep, int, str]:
    """A step, its number of query heads, and what it is called."""
    kind, dtype = ("decode", "chunk", "long", "prefill", "idle")[i % 5], world.dtype(i // 2)
    group, head_dim, K = GROUPS[i % len(GROUPS)], HEAD_DIMS[i % len(HEAD_DIMS)], (1, 2, 4)[i % 3]
    query_lens, seq_lens = lengths(world, kind, world.backend.default_block_size)
    step = PagedStep(world.backend, query_lens, seq_lens, num_kv_heads=K, head_dim=head_dim, dtype=dtype,
                     generator=world.generator, kv_dtype=kv_dtype)  # fmt: skip
    over = f"/over {QUANTISED[kv_dtype]}" if kv_dtype else ""
    return step, K * group, f"{kind}/S{len(seq_lens)}/g{group}/hd{head_dim}/{short(dtype)}{over}"


def random_steps(world: World, count: int) -> Iterator[tuple[int, PagedStep, int, str]]:
    """Numbered; over caches of the compute dtype, then some over each dtype of one byte that there is."""
    for i in range(count):
        yield i, *random_step(world, i)
    for kv_dtype in world.backend.kv_dtypes:
        for i in range(min(count, max(5, count // 2))):
            yield i, *random_step(world, i, kv_dtype)


def attention_cases(world: World) -> Iterator[Check]:
    yield from absent_caches(world)
    for i, step, num_heads, name in random_steps(world, world.cases):
        q, caches = step.random(sum(step.query_lens), num_heads, step.H), step.filled_caches()
        for window in (None, world.rng.choice((1, 17, 200))) if i % 3 == 0 else (None,):
            yield Check(name=f"{name}{f'/window{window}' if window else ''}", tolerance=2 * TOLERANCE[step.dtype],
                        may_refuse=step.kv_dtype in QUANTISED,
                        run=later(step.attend, world.ops, q, caches, window),
                        truth=later(step.truth, q, window))  # fmt: skip


def plan_cases(world: World) -> Iterator[Check]:
    """One plan for two layers, the second with a window."""
    for _, step, num_heads, name in random_steps(world, max(2, world.cases // 4)):
        q1, q2 = (step.random(sum(step.query_lens), num_heads, step.H) for _ in range(2))
        caches = step.filled_caches()

        def run(s: PagedStep = step, q1: Tensor = q1, q2: Tensor = q2, c: Any = caches) -> Sequence[Tensor]:
            plan = s.plan(world.ops, q1.shape[1])
            return s.attend(world.ops, q1, c, plan=plan), s.attend(world.ops, q2, c, 17, plan=plan)

        def truth(s: PagedStep = step, q1: Tensor = q1, q2: Tensor = q2) -> Sequence[Tensor]:
            return s.truth(q1), s.truth(q2, 17)

        yield Check(name=name, run=run, truth=truth, tolerance=2 * TOLERANCE[step.dtype],
                    may_refuse=step.kv_dtype in QUANTISED)  # fmt: skip


def qkv_rope_write_cases(world: World) -> Iterator[Check]:
    yield from absent_caches(world)
    for i, step, num_heads, name in random_steps(world, world.cases):
        yield rope_check(world, step, num_heads, f"{name}{'/normed' * (i % 2)}", normed=i % 2 == 1)


def rope_check(world: World, step: PagedStep, num_heads: int, name: str, *, normed: bool,
               judge: torch.device | None = None) -> Check:
    """judge: where float64 is computed, if not on the device itself."""
    T, K, H = sum(step.query_lens), step.K, step.H
    qkv, positions = step.random(T, (num_heads + 2 * K) * H), world.randint(500, T, dtype=torch.int32)
    angles = world.rand(500, H // 2) * 6.3
    table = torch.cat((angles.cos(), angles.sin()), 1)
    q_norm, k_norm = (step.random(H), step.random(H)) if normed else (None, None)
    step.meta.slot_mapping_T[:: max(2, T // 3)] = -1  # padding, which is not stored

    def run() -> Sequence[Tensor]:
        k_cache, v_cache = step.empty_caches()
        q = world.ops.qkv_rope_write(qkv.clone(), positions, table, k_cache, v_cache, step.meta, num_heads=num_heads,
                                     num_kv_heads=K, head_dim=H, q_norm_H=q_norm, k_norm_H=k_norm)  # fmt: skip
        return q, *numbers(world, k_cache, v_cache)

    def truth() -> Sequence[Tensor]:
        at = judge or qkv.device
        q, k, v = qkv.to(at).view(T, -1, H).double().split([num_heads, K, K], dim=1)
        if q_norm is not None and k_norm is not None:
            q, k = norm_truth(q, q_norm.to(at), 1e-6), norm_truth(k, k_norm.to(at), 1e-6)
        angles_TH, slots = table.to(at)[positions.long().to(at)], step.meta.slot_mapping_T.to(at)
        kept = slots >= 0
        blocks, offsets = slots[kept].long() // step.P, slots[kept].long() % step.P
        held = [torch.full((step.shape[0], K, step.P, H), torch.nan, dtype=torch.float64, device=at) for _ in "kv"]
        for x_BKPH, new in zip(held, (_rotate(k, angles_TH), v)):
            x_BKPH[blocks, :, offsets] = step.held(new[kept]).double()
        return _rotate(q, angles_TH), *held

    tolerance = TOLERANCE[step.dtype]
    if step.kv_dtype in QUANTISED:
        tolerance = max(tolerance, NEXT_CODES[step.kv_dtype][step.dtype.itemsize])
    return Check(name=name, run=run, truth=truth, tolerance=tolerance, may_refuse=step.kv_dtype in QUANTISED)


def numbers(world: World, k_cache: Tensor, v_cache: Tensor) -> tuple[Tensor, Tensor]:
    return numbers_BKPH(world.backend, k_cache, keys=True), numbers_BKPH(world.backend, v_cache, keys=False)


def _rotate(x_TXH: Tensor, cos_sin_TH: Tensor) -> Tensor:
    (first, second), (cos, sin) = x_TXH.chunk(2, -1), cos_sin_TH.double()[:, None].chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def copy_blocks_cases(world: World) -> Iterator[Check]:
    """The bytes, whatever they mean."""
    for i, kv_dtype in enumerate([*[None] * world.cases, *world.backend.kv_dtypes]):
        step = PagedStep(world.backend, [1] * 5, [4 * world.backend.default_block_size] * 5, num_kv_heads=2,
                         head_dim=64, dtype=world.dtype(i), generator=world.generator, kv_dtype=kv_dtype)  # fmt: skip
        cache = step.filled_caches()[0]
        order = torch.randperm(23, generator=world.generator, device=world.device.torch)
        src, dst = order[: 1 + i % 9], order[10 : 11 + i % 9]

        def run(cache: Tensor = cache, src: Tensor = src, dst: Tensor = dst) -> Sequence[Tensor]:
            changed = cache.clone()
            world.ops.copy_blocks(changed, src, dst)
            return (changed.view(torch.uint8),)

        def truth(cache: Tensor = cache, src: Tensor = src, dst: Tensor = dst) -> Sequence[Tensor]:
            source, changed = cache.view(torch.uint8), cache.clone().view(torch.uint8)
            for s, d in zip(src.tolist(), dst.tolist()):
                changed[d] = source[s]
            return (changed,)

        yield Check(name=f"{len(src)}of23/{short(cache.dtype)}", run=run, truth=truth, may_refuse=kv_dtype is not None)


def stored_bytes_cases(world: World) -> Iterator[Check]:
    sizes = {"fp32": 4 * 64, "bf16": 2 * 64, "fp16": 2 * 64, "int8": 64 + 4, "fp8": 64 + 1}  # of a position of a head
    P = world.backend.default_block_size
    for format, size in sizes.items():
        for kv_dtype in (None, *(dtype for dtype in world.backend.kv_dtypes if QUANTISED[dtype] == format)):
            step = PagedStep(world.backend, [1], [5], num_kv_heads=2, head_dim=64, dtype=world.dtypes[0],
                             generator=world.generator, kv_dtype=kv_dtype)  # fmt: skip
            cache = step.empty_caches()[0]

            def run(cache: Tensor = cache, format: str = format) -> Sequence[Tensor]:
                return (torch.tensor([world.ops.stored_bytes((cache, cache), format=format)]),)

            yield Check(name=f"{format} of {short(cache.dtype)}", may_refuse=kv_dtype is not None, run=run,
                        truth=later(torch.tensor, [2 * 2 * P * size]))


def export_cases(world: World) -> Iterator[Check]:
    """Out to host memory and back into other caches: what was exported must be there, and nothing else."""
    for i in range(max(world.cases, len(STORED))):
        yield transfer_check(world, list(STORED)[i % len(STORED)], world.dtype(i // len(STORED)))
    yield from absent_caches(world)
    for kv_dtype in world.backend.kv_dtypes:
        yield transfer_check(world, QUANTISED[kv_dtype], world.dtypes[0], kv_dtype)


def transfer_check(world: World, format: str, dtype: torch.dtype, kv_dtype: torch.dtype | None = None, *,
                   num_kv_heads: int = 2, head_dim: int = 64) -> Check:
    step = PagedStep(world.backend, [1] * 3, [world.backend.default_block_size * n for n in (2, 1, 4)],
                     num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=dtype, generator=world.generator,
                     kv_dtype=kv_dtype)  # fmt: skip
    caches, blocks = step.filled_caches(), torch.tensor(step.meta.block_table_SM[2, :4].tolist())
    slots = torch.tensor([5, 0, 7, 2])

    def run() -> Sequence[Tensor]:
        num_bytes = world.ops.stored_bytes(step.empty_caches(), format=format)
        store, arrived = world.host_memory(9 * num_bytes).view(9, num_bytes).fill_(0xAB), step.empty_caches()
        world.ops.export_blocks(caches, blocks, store, slots, format=format)
        world.backend.synchronize_copies()
        world.ops.import_blocks(arrived, blocks, store, slots, format=format)
        world.backend.synchronize_copies()
        return *numbers(world, *arrived), store.clone()

    def truth() -> Sequence[Tensor]:
        kept = step.empty_caches()
        for cache, source in zip(kept, caches):
            at = blocks.to(cache.device)
            cache.view(torch.uint8)[at] = source.view(torch.uint8)[at]
        return numbers(world, *kept)

    exact = format == "fp32" or kv_dtype or {"bf16": torch.bfloat16, "fp16": torch.float16}.get(format) is dtype
    return Check(name=f"{format}/{short(step.kv_dtype)}", run=run, truth=truth,
                 tolerance=0.0 if exact else STORED[format], may_refuse=kv_dtype is not None)  # fmt: skip


OPERATORS: dict[str, Cases] = {
    "attention": attention_cases, "plan": plan_cases, "qkv_rope_write": qkv_rope_write_cases,
    "copy_blocks": copy_blocks_cases, "stored_bytes": stored_bytes_cases, "export_blocks": export_cases,
    "import_blocks": export_cases,
}  # fmt: skip
