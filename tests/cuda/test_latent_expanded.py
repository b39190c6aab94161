"""Latent attention of CUDA where lengths are known on the host: which sequences are expanded, and that both forms are
the truth."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from backends import cuda_latent
from backends.metadata import HostLengths
from backends.opset import OpSet
from backends.reference.kv_codes import QUANTISED
from cuda_ops import latent, latent_expanded, launch
from cuda_ops.latent_expanded import Widths
from tests.ops.conftest import Groups, Paged, kv_dtype
from tests.ops.test_latent import L, N, R, inputs, truth
from xllm.runner.warm_up import warm_up_chunks

__all__ = ["kv_dtype"]

# A token, a chunk behind others, drafts, a shorter one that is not worth it, a row that is idle, a prompt.
QUERIES, LENGTHS = [1, 20, 2, 10, 0, 17], [9, 45, 20, 33, 5, 17]
CHUNK, PROMPT, TOTAL = set(range(1, 21)), set(range(33, 50)), 50


@dataclass
class Ran:
    """The tokens of each call of either form. held: bytes of gathered latents, keys and values, at most."""

    expanded: list[set[int]] = field(default_factory=list)
    absorbed: list[int] = field(default_factory=list)
    held: int = 0


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Ran:
    """Everything that saves a multiplication is expanded. What runs is written down, and runs."""
    found, attend, absorb, some = Ran(), latent_expanded.attend, latent.latent_attention, latent_expanded._attend_heads

    def attended(*args: Any, **options: Any) -> None:
        found.expanded.append({row for first, count, *_ in args[4].blocks_X5.tolist()
                               for row in range(first, first + count)})
        attend(*args, **options)

    def absorbed(*args: Any, **options: Any) -> Tensor:
        found.absorbed.append(len(args[0]))
        return absorb(*args, **options)

    def attended_some(q_TNX: Tensor, up_HYL: Tensor, first: int, kept_CX: Tensor, *rest: Any) -> None:
        made = len(kept_CX) * up_HYL.shape[0] * up_HYL.shape[1] * kept_CX.element_size()
        found.held = max(found.held, kept_CX.nbytes + made)
        some(q_TNX, up_HYL, first, kept_CX, *rest)

    monkeypatch.setattr(latent_expanded, "attend", attended)
    monkeypatch.setattr(latent_expanded, "_attend_heads", attended_some)
    monkeypatch.setattr(latent, "latent_attention", absorbed)
    monkeypatch.setattr(cuda_latent, "LEAST_SAVED", 0)
    return found


def with_lengths(case: Paged) -> Paged:
    case.meta.host = HostLengths(case.meta.query_start_S1.numpy(), case.meta.seq_lens_S.numpy())
    return case


def paged(*, query_lens: list[int] = QUERIES, seq_lens: list[int] = LENGTHS, block_size: int = 32,
          **options: Any) -> Paged:
    return with_lengths(Paged(query_lens=query_lens, seq_lens=seq_lens, num_heads=N, num_kv_heads=1, head_dim=L + R,
                              block_size=block_size, **options))


def check(ops: OpSet, case: Paged, *, dtype: torch.dtype = torch.float32, atol: float = 3e-6) -> None:
    q_TNX, up_NYL = (x.to(dtype) for x in inputs(case))
    out = ops.latent_attention(q_TNX, up_NYL, case.v_cache, case.meta, scale=0.3)
    assert out.dtype is dtype
    torch.testing.assert_close(out.double(), truth(case, q_TNX, up_NYL, 0.3), rtol=0, atol=atol)


@pytest.mark.parametrize(("contiguous", "block_size", "stored"), [
    (False, 16, torch.float32), (True, 64, torch.float32), *((True, 16, each) for each in QUANTISED),
    *((False, 64, each) for each in QUANTISED)], ids=str)
def test_each_sequence_takes_its_form(ops: OpSet, ran: Ran, contiguous: bool, block_size: int,
                                      stored: torch.dtype) -> None:
    """Over blocks that are tiles of those that gather, and smaller ones. Whatever is no sequence's is NaN."""
    check(ops, paged(contiguous=contiguous, block_size=block_size, gap=8, kv_dtype=stored))
    assert ran.expanded == [CHUNK | PROMPT] and ran.absorbed == [1 + 2 + 10]


def test_prompts_alone(ops: OpSet, ran: Ran) -> None:
    check(ops, paged(query_lens=[17, 0, 9], seq_lens=[17, 0, 9]))
    assert ran.expanded == [set(range(26))] and ran.absorbed == []


def test_without_lengths_on_the_host_nothing_is_expanded(ops: OpSet, ran: Ran) -> None:
    case = paged()
    case.meta.host = None
    check(ops, case)
    assert ran.expanded == [] and ran.absorbed == [TOTAL]


def test_layers_share_the_choice(ops: OpSet, ran: Ran, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is made once a step, with what its tables say copied to the device once."""
    copies: list[Tensor] = []
    monkeypatch.setattr(latent_expanded, "to_device", lambda table, device: copies.append(table) or table)
    case = paged()
    case.meta.plan = ops.plan(case.meta, num_heads=N, num_kv_heads=1, head_dim=L + R)
    for _ in range(2):
        check(ops, case)
    assert len(copies) == 1 and ran.expanded == [CHUNK | PROMPT] * 2


@pytest.mark.parametrize(("per_position", "expanded"), [(60, [CHUNK, PROMPT]), (54, [CHUNK, PROMPT]), (53, [PROMPT])])
def test_memory_is_bounded(ops: OpSet, ran: Ran, monkeypatch: pytest.MonkeyPatch, per_position: int,
                           expanded: list[set[int]]) -> None:
    """By so many numbers for each position of the longest, of which one head takes 54: heads take turns, sequences do,
    and what does not fit is absorbed."""
    monkeypatch.setattr(cuda_latent, "EXPANDED_BYTES", 45 * per_position * 4)
    check(ops, paged())
    assert ran.expanded == expanded and ran.held <= 45 * per_position * 4
    assert sum(ran.absorbed) == TOTAL - sum(map(len, expanded))


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float16, 1e-2), (torch.bfloat16, 8e-2)], ids=str)
def test_half_precision(ops: OpSet, ran: Ran, dtype: torch.dtype, atol: float) -> None:
    check(ops, paged().to(dtype), dtype=dtype, atol=atol)
    assert ran.expanded


def test_the_numbers_of_deepseek(ops: OpSet, ran: Ran) -> None:
    """Its widths, with the tiles that a device takes: rows that see whole tiles, and blocks that are not full."""
    case = with_lengths(Paged(query_lens=[140, 1], seq_lens=[330, 40], num_heads=2, num_kv_heads=1, head_dim=576,
                              block_size=128)).to(torch.bfloat16)
    q_TNX, up_NYL = torch.randn(141, 2, 192).bfloat16(), (torch.randn(2, 256, 512) / 512**0.5).bfloat16()
    out = ops.latent_attention(q_TNX, up_NYL, case.v_cache, case.meta, scale=192**-0.5)
    exact = truth(case, q_TNX, up_NYL, 192**-0.5, key_dim=128)
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=2e-2)
    assert ran.expanded == [set(range(140))] and ran.absorbed == [1]


def test_nan_stays_in_its_query(ops: OpSet, ran: Ran) -> None:
    case = paged()
    q_TNX, up_NYL = inputs(case)
    clean = ops.latent_attention(q_TNX.clone(), up_NYL, case.v_cache, case.meta, scale=0.3)
    q_TNX[3] = torch.nan
    dirty = ops.latent_attention(q_TNX, up_NYL, case.v_cache, case.meta, scale=0.3)
    others = torch.arange(TOTAL) != 3
    assert dirty[3].isnan().all() and torch.equal(dirty[others], clean[others])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_codes_are_gathered_as_what_they_stand_for(kv_dtype: torch.dtype, dtype: torch.dtype) -> None:
    """The largest numbers of fp16, some of which are rounded beyond, and what was NaN."""
    case = paged(query_lens=[9], seq_lens=[40], block_size=16, kv_dtype=kv_dtype)
    groups, position = Groups.of(case.ops, case.v_cache, keys=False), torch.arange(40)
    written = case.values[0] / case.values[0].abs().amax(2, keepdim=True) * 65504
    written[5, 0, 2] = torch.nan
    read = groups.put(case.meta.block_table_SM[0, position // 16].long(), position % 16, written)
    q_TNX, up_NYL = (x.to(dtype) for x in inputs(case))
    widths, batch = Widths.of(q_TNX, up_NYL, case.v_cache), latent_batch(case)
    chunk = latent_expanded.Chunk(sequence=0, first_row=0, num_queries=9, seq_len=40)
    run, = latent_expanded.plan([chunk], widths, q_TNX, 2**20)
    kept_CX = latent_expanded.gather(case.v_cache, batch, run, widths, q_TNX)
    most = torch.finfo(dtype).max
    torch.testing.assert_close(kept_CX, read[:, 0].clamp(-most, most).to(dtype), rtol=0, atol=0, equal_nan=True)
    assert kept_CX[5].isnan().all() and not kept_CX[6:].isnan().any()


@pytest.mark.parametrize("num_heads", [128, 64, 32, 16, 8, 4, 2, 1])
def test_what_is_warmed_up_takes_both_forms(num_heads: int) -> None:
    """For as few heads as a rank may have, at the widths of DeepSeek."""
    case, forms = paged(query_lens=[1], seq_lens=[1]), []
    for num_tokens, num_past in warm_up_chunks(longest=2048, max_len=8192, varies=True):
        host = HostLengths(np.array([0, num_tokens], dtype=np.int32), np.array([num_past + num_tokens], dtype=np.int32))
        forms.append(cuda_latent.choose(host, latent_batch(case), num_heads,
                                        Widths(latent=512, rotated=64, key=128, value=128),
                                        torch.empty(0, dtype=torch.bfloat16)))
    assert any(form is None for form in forms) and any(form is not None for form in forms)


def latent_batch(case: Paged) -> Any:
    from backends.cuda import _batch

    return _batch(case.meta)


@pytest.mark.parametrize(("num_heads", "expanded"), [(128, [0, 1, 2, 3]), (16, [0, 1, 3])], ids=["V3", "V2-Lite"])
def test_what_is_chosen_at_the_sizes_of_deepseek(monkeypatch: pytest.MonkeyPatch, num_heads: int,
                                                 expanded: list[int]) -> None:
    """A short prompt is worth its launches where many heads share them. Where a long past leaves room for few heads, a
    chunk must be long to keep a device busy."""
    monkeypatch.setattr(launch, "INTERPRETED_SMS", 132)
    lengths = [(4096, 4096), (4096, 131_072), (512, 512), (512, 2000), (256, 256), (128, 8192), (300, 200_000),
               (1, 9000)]  # fmt: skip
    starts = np.cumsum([0, *(queries for queries, _ in lengths)], dtype=np.int32)
    host = HostLengths(starts, np.array([length for _, length in lengths], dtype=np.int32))
    case = paged(query_lens=[1] * 8, seq_lens=[1] * 8)
    widths = Widths(latent=512, rotated=64, key=128, value=128)
    forms = cuda_latent.choose(host, latent_batch(case), num_heads, widths, torch.empty(0, dtype=torch.bfloat16))
    assert forms is not None and forms.absorbed is not None
    assert {s for run in forms.runs for s, *_ in run.tiles_X4.tolist()} == {*expanded}
    assert forms.absorbed.num_tokens == sum(queries for s, (queries, _) in enumerate(lengths) if s not in expanded)
    assert all(run.num_positions * (576 + 256 * run.most_heads) * 2 <= 2**29 for run in forms.runs)
