"""Latent attention against float64 truth: what is stored, both ways to address blocks, steps of all kinds, poison."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from backends.cpu import latent
from backends.latent_form import expanding_is_less
from backends.opset import OpSet
from backends.reference.kv import latents_of
from backends.reference.kv_codes import QUANTISED
from tests.ops.conftest import NAN, Paged, sizes

P, N, L, R, D, V = 4, 3, 24, 8, 12, 10
STEPS = {"decode": ([1, 1, 1, 1], [1, P, P + 1, 31]), "mixed": ([1, 7, 2, 19], [9, 7, 33, 26]),
         "prefill": ([1, P, 37], [1, P, 37]), "an-empty-row": ([3, 0, 1], [5, 0, 9])}


def paged(step: str, *, contiguous: bool = False, gap: int = 0, kv_dtype: torch.dtype = torch.float32) -> Paged:
    """Latents lie as values do: `v_cache` and `values`."""
    query_lens, seq_lens = STEPS[step]
    return Paged(query_lens=query_lens, seq_lens=seq_lens, num_heads=N, num_kv_heads=1, head_dim=L + R, block_size=P,
                 contiguous=contiguous, gap=gap, kv_dtype=kv_dtype)


def truth(case: Paged, q_TNX: Tensor, up_NYL: Tensor, scale: float, key_dim: int = D) -> Tensor:
    rows, t, up, (N, _, L) = [], 0, up_NYL.double(), up_NYL.shape
    for kept, query_len in zip(case.values, case.query_lens):
        latents, shared = kept[:, 0].double().tensor_split([L], dim=1)
        made = torch.einsum("cl,nyl->ncy", latents, up)
        keys = torch.cat((made[..., :key_dim], shared.expand(N, -1, -1)), dim=-1)
        scores = torch.einsum("qnx,ncx->nqc", q_TNX[t : t + query_len].double() * scale, keys)
        later = torch.ones(query_len, len(kept)).triu(len(kept) - query_len + 1).bool()
        weights = scores.masked_fill(later, -torch.inf).softmax(-1)
        rows.append(torch.einsum("nqc,ncv->qnv", weights, made[..., key_dim:]).flatten(1))
        t += query_len
    return torch.cat(rows)


def inputs(case: Paged) -> tuple[Tensor, Tensor]:
    return torch.randn(sum(case.query_lens), N, D + R), torch.randn(N, D + V, L) / L**0.5


@pytest.mark.parametrize("form", sizes(["chosen", "expanded", "absorbed", "tiled"], ["chosen"]))
@pytest.mark.parametrize("contiguous", [False, True], ids=["table", "base"])
@pytest.mark.parametrize("step", STEPS)
def test_attention(ops: OpSet, monkeypatch: pytest.MonkeyPatch, step: str, contiguous: bool, form: str) -> None:
    """What neither reads nor writes outside its sequences, in each form that the CPU has."""
    if form in ("expanded", "absorbed"):
        monkeypatch.setattr(latent, "expanding_is_less", lambda queries, *_: form == "expanded" and queries > 0)
    if form == "tiled":
        monkeypatch.setattr(latent, "MAX_SCORES", 100)
    case = paged(step, contiguous=contiguous, gap=13)
    q_TNX, up_NYL = inputs(case)
    out = ops.latent_attention(q_TNX.clone(), up_NYL, case.v_cache, case.meta, scale=0.3)
    assert out.shape == (len(q_TNX), N * V) and out.dtype is torch.float32
    torch.testing.assert_close(out.double(), truth(case, q_TNX, up_NYL, 0.3), rtol=0, atol=3e-6)


@pytest.mark.parametrize("contiguous", [False, True], ids=["table", "base"])
@pytest.mark.parametrize(("heads", "latent_width", "rotated", "kv_dtype"), [
    (20, 64, 16, torch.float32), (3, 75, 6, torch.float32), *((3, 75, 6, each) for each in QUANTISED)], ids=str)
def test_decoding_over_long_contexts(ops: OpSet, heads: int, latent_width: int, rotated: int, kv_dtype: torch.dtype,
                                     contiguous: bool) -> None:
    """Contexts in parts, several drafts of a sequence, heads and widths that fill nothing evenly."""
    seq_lens = sizes([1300, 700, 512, 513], [150, 70, 32, 33])
    case = Paged(query_lens=[1, 3, 1, 1], seq_lens=seq_lens, num_heads=heads, num_kv_heads=1,
                 head_dim=latent_width + rotated, block_size=16, contiguous=contiguous, gap=8, kv_dtype=kv_dtype)
    q_TNX, up_NYL = torch.randn(6, heads, 12 + rotated), torch.randn(heads, 12 + 10, latent_width) / latent_width**0.5
    out = ops.latent_attention(q_TNX.clone(), up_NYL, case.v_cache, case.meta, scale=0.3)
    exact = truth(case, q_TNX, up_NYL, 0.3, key_dim=12)
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=3e-6)


def test_the_form_is_the_one_of_less_work() -> None:
    """DeepSeek V3's widths: a prompt is expanded, a decoding row is not, a chunk behind its prefix by its size."""
    widths = (128, 128, 512)
    assert expanding_is_less(4096, 4096, *widths) and not expanding_is_less(1, 4096, *widths)
    assert expanding_is_less(256, 8192, *widths) and not expanding_is_less(128, 8192, *widths)


@pytest.mark.parametrize("kv_dtype", QUANTISED, ids=QUANTISED.__getitem__)
@pytest.mark.parametrize("contiguous", [False, True], ids=["table", "base"])
def test_quantised_latents(ops: OpSet, kv_dtype: torch.dtype, contiguous: bool) -> None:
    case = paged("mixed", contiguous=contiguous, kv_dtype=kv_dtype)
    q_TNX, up_NYL = inputs(case)
    out = ops.latent_attention(q_TNX.clone(), up_NYL, case.v_cache, case.meta, scale=0.3)
    torch.testing.assert_close(out.double(), truth(case, q_TNX, up_NYL, 0.3), rtol=0, atol=3e-6)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float16, 1e-2), (torch.bfloat16, 8e-2)], ids=str)
def test_half_precision(ops: OpSet, dtype: torch.dtype, atol: float) -> None:
    case = paged("mixed").to(dtype)
    q_TNX, up_NYL = (x.to(dtype) for x in inputs(case))
    out = ops.latent_attention(q_TNX.clone(), up_NYL, case.v_cache, case.meta, scale=0.3)
    assert out.dtype is dtype
    torch.testing.assert_close(out.double(), truth(case, q_TNX, up_NYL, 0.3), rtol=0, atol=atol)


def test_nan_stays_in_its_query(ops: OpSet) -> None:
    case = paged("mixed")
    q_TNX, up_NYL = inputs(case)
    clean = ops.latent_attention(q_TNX.clone(), up_NYL, case.v_cache, case.meta, scale=0.3)
    q_TNX[0] = NAN
    dirty = ops.latent_attention(q_TNX, up_NYL, case.v_cache, case.meta, scale=0.3)
    assert dirty[0].isnan().all() and torch.equal(dirty[1:], clean[1:])


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])
@pytest.mark.parametrize("kv_dtype", [torch.float32, *QUANTISED], ids=str)
def test_write(ops: OpSet, kv_dtype: torch.dtype, interleaved: bool) -> None:
    """Views of wider products, a token that is not written, and all other slots as they were."""
    case = paged("mixed", kv_dtype=kv_dtype)
    T = sum(case.query_lens)
    latent_TX, q_TNX, norm_L = torch.randn(T, 5 + L + R)[:, 5:], torch.randn(T, N, D + R), 1 + 0.2 * torch.randn(L)
    positions_T = torch.cat([torch.arange(n - q, n) for q, n in zip(case.query_lens, case.seq_lens)]).int()
    angles = torch.arange(64.0)[:, None] / 50.0 ** (torch.arange(R // 2) / (R // 2))
    slots_T = case.meta.slot_mapping_T.clone()
    slots_T[3] = -1
    before = case.v_cache.view(torch.uint8).clone()
    q = ops.latent_rope_write(
        latent_TX.clone(), q_TNX.clone(), positions_T, torch.cat((angles.cos(), angles.sin()), dim=1), case.v_cache,
        replace(case.meta, slot_mapping_T=slots_T), norm_weight_L=norm_L, eps=1e-6, interleaved=interleaved)
    turned = torch.polar(torch.ones(T, R // 2, dtype=torch.float64), angles.double()[positions_T.long()])

    def rotated(x: Tensor) -> Tensor:
        pairs = x.unflatten(-1, (-1, 2)) if interleaved else x.unflatten(-1, (2, -1)).transpose(-1, -2)
        found = torch.view_as_complex(pairs.double().contiguous()) * (turned if x.dim() == 2 else turned[:, None])
        return torch.cat((found.real, found.imag), dim=-1)

    torch.testing.assert_close(q[..., D:].double(), rotated(q_TNX[..., D:]), rtol=0, atol=1e-5)
    assert torch.equal(q[..., :D], q_TNX[..., :D])
    normed = torch.nn.functional.rms_norm(latent_TX[:, :L].double(), (L,), norm_L.double(), 1e-6)
    expected = torch.cat((normed, rotated(latent_TX[:, L:])), dim=1)
    found = torch.cat([latents_of(case.v_cache, case.meta, s, n)[n - q:] for s, (q, n) in
                       enumerate(zip(case.query_lens, case.seq_lens))]).double()
    written = slots_T >= 0
    error = (found - expected)[written].abs().amax(1) / expected[written].abs().amax(1)
    assert float(error.max()) < {torch.float32: 1e-5, torch.int8: 0.005}.get(kv_dtype, 0.07)
    untouched = torch.ones(len(case.v_cache) * P, dtype=torch.bool)
    untouched[slots_T[written].long()] = False
    if kv_dtype is torch.float32:
        rows, old = (x.view(torch.uint8).reshape(len(untouched), -1) for x in (case.v_cache, before))
        assert torch.equal(rows[untouched], old[untouched])
