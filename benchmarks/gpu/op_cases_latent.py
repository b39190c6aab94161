"""Cases of the operators of latent attention; see `op_cases.py`. Latents lie in a cache as one head of values does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from backends.reference.kv_codes import QUANTISED
from benchmarks.gpu.op_cases import TOLERANCE, Cases, Check, World, norm_truth, short
from benchmarks.gpu.op_cases_kv import NEXT_CODES, absent_caches, lengths
from benchmarks.gpu.paged import PagedStep, numbers_BKPH

EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class Widths:
    """N heads; of a latent, of the rotated part, of the rest of a key, of a value."""

    heads: int
    L: int
    R: int
    D: int
    V: int

    def __str__(self) -> str:
        return f"N{self.heads}/{self.L}+{self.R}"


V2_LITE = Widths(heads=16, L=512, R=64, D=128, V=128)
# DeepSeek's, of whole models and of a rank's heads, and others that fill nothing evenly.
WIDTHS = (V2_LITE, Widths(heads=128, L=512, R=64, D=128, V=128), Widths(heads=3, L=75, R=6, D=12, V=10),
          Widths(heads=8, L=512, R=64, D=128, V=128), Widths(heads=20, L=256, R=32, D=64, V=48))
SMALL = (Widths(heads=16, L=64, R=16, D=24, V=20), Widths(heads=3, L=75, R=6, D=12, V=10))  # for a CPU


def latent_step(world: World, widths: Widths, query_lens: Sequence[int], seq_lens: Sequence[int], dtype: torch.dtype,
                kv_dtype: torch.dtype | None) -> PagedStep:
    return PagedStep(world.backend, query_lens, seq_lens, num_kv_heads=1, head_dim=widths.L + widths.R, dtype=dtype,
                     generator=world.generator, kv_dtype=kv_dtype)


def random_steps(world: World) -> Iterator[tuple[str, Widths, PagedStep]]:
    yields = [*[None] * world.cases, *(d for d in world.backend.kv_dtypes for _ in range(max(5, world.cases // 2)))]
    for i, kv_dtype in enumerate(yields):
        kind, dtype = ("decode", "chunk", "long", "prefill", "idle")[i % 5], world.dtype(i // 2)
        widths = world.rng.choice(WIDTHS if world.device.is_cuda else SMALL)
        query_lens, seq_lens = lengths(world, kind, world.backend.default_block_size)
        over = f"/over {QUANTISED[kv_dtype]}" if kv_dtype else ""
        yield (f"{kind}/S{len(seq_lens)}/{widths}/{short(dtype)}{over}", widths,
               latent_step(world, widths, query_lens, seq_lens, dtype, kv_dtype))


def attention_cases(world: World) -> Iterator[Check]:
    yield from absent_caches(world)
    for name, widths, step in random_steps(world):
        yield attention_check(world, step, widths, name)


def attention_check(world: World, step: PagedStep, widths: Widths, name: str,
                    judge: torch.device | None = None) -> Check:
    """judge: where float64 is computed, if not on the device itself."""
    q_TNX = step.random(sum(step.query_lens), widths.heads, widths.D + widths.R)
    up_NYL = (step.random(widths.heads, widths.D + widths.V, widths.L).float() / widths.L**0.5).to(step.dtype)
    cache, scale = step.filled_caches()[1], (widths.D + widths.R) ** -0.5

    def truth() -> Sequence[Tensor]:
        at = judge or q_TNX.device
        q, up, kept = q_TNX.to(at).double() * scale, up_NYL.to(at).double(), step.values_CKH[:, 0].to(at).double()
        return (attention_truth(q, up, kept, step, widths),)

    return Check(name=name, run=lambda: (world.ops.latent_attention(q_TNX.clone(), up_NYL, cache, step.meta,
                                                                    scale=scale),),
                 truth=truth, tolerance=2 * TOLERANCE[step.dtype], may_refuse=step.kv_dtype in QUANTISED)  # fmt: skip


def attention_truth(q_TNX: Tensor, up_NYL: Tensor, kept_CH: Tensor, step: PagedStep, widths: Widths) -> Tensor:
    """By the definition: keys and values are made of all latents."""
    rows, t, c = [], 0, 0
    for query_len, seq_len in zip(step.query_lens, step.seq_lens):
        latents, shared = kept_CH[c : c + seq_len].split([widths.L, widths.R], dim=1)
        later = torch.ones(query_len, seq_len, device=q_TNX.device).triu(seq_len - query_len + 1).bool()
        heads = []
        for q_QX, up_YL in zip(q_TNX[t : t + query_len].unbind(1), up_NYL):
            keys, values = (latents @ up_YL.T).split([widths.D, widths.V], dim=1)
            scores = q_QX @ torch.cat((keys, shared), 1).T
            heads.append(scores.masked_fill(later, -torch.inf).softmax(-1) @ values)
        rows.append(torch.cat(heads, 1))
        t, c = t + query_len, c + seq_len
    return torch.cat(rows)


def rope_write_cases(world: World) -> Iterator[Check]:
    yield from absent_caches(world)
    for i, (name, widths, step) in enumerate(random_steps(world)):
        yield rope_write_check(world, step, widths, f"{name}{'/pairs' * (i % 2)}", interleaved=i % 2 == 1)


def rope_write_check(world: World, step: PagedStep, widths: Widths, name: str, *, interleaved: bool,
                     judge: torch.device | None = None) -> Check:
    T, L, R = sum(step.query_lens), widths.L, widths.R
    latent_TX, q_TNX = step.random(T, 16 + L + R)[:, 16:], step.random(T, widths.heads, widths.D + R)
    positions, norm_L = world.randint(500, T, dtype=torch.int32), step.random(L)
    angles = world.rand(500, R // 2) * 6.3
    table = torch.cat((angles.cos(), angles.sin()), 1)
    step.meta.slot_mapping_T[:: max(2, T // 3)] = -1  # padding, which is not stored

    def run() -> Sequence[Tensor]:
        cache = step.empty_caches()[1]
        q = world.ops.latent_rope_write(latent_TX.clone(), q_TNX.clone(), positions, table, cache, step.meta,
                                        norm_weight_L=norm_L, eps=EPS, interleaved=interleaved)  # fmt: skip
        return q, numbers_BKPH(world.backend, cache, keys=False)

    def truth() -> Sequence[Tensor]:
        at = judge or q_TNX.device
        cos_sin, latent, q = table.to(at)[positions.long().to(at)].double(), latent_TX.to(at).double(), q_TNX.to(at)
        turned = _rotate(latent[:, L:], cos_sin, interleaved)
        kept_TX = torch.cat((norm_truth(latent[:, :L], norm_L.to(at), EPS), turned), 1).to(step.dtype)
        held = torch.full((step.shape[0], 1, step.P, L + R), torch.nan, dtype=torch.float64, device=at)
        slots = step.meta.slot_mapping_T.to(at)
        written = slots >= 0
        places = slots[written].long()
        held[places // step.P, :, places % step.P] = step.held(kept_TX[written, None]).double()
        q_turned = _rotate(q[..., -R:].double(), cos_sin[:, None], interleaved)
        return torch.cat((q[..., :-R].double(), q_turned), -1), held

    tolerance = TOLERANCE[step.dtype]
    if step.kv_dtype in QUANTISED:
        # Twice that of keys: the rotated numbers share the latent's scale, and a small step has few of them.
        tolerance = max(tolerance, 2 * NEXT_CODES[step.kv_dtype][step.dtype.itemsize])
    return Check(name=name, run=run, truth=truth, tolerance=tolerance, may_refuse=step.kv_dtype in QUANTISED)


def _rotate(x: Tensor, cos_sin: Tensor, interleaved: bool) -> Tensor:
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    cos, sin = cos_sin.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


OPERATORS: dict[str, Cases] = {"latent_rope_write": rope_write_cases, "latent_attention": attention_cases}
