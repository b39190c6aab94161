"""Latent attention on the device against the reference, which makes all keys and values: steps of all kinds, both of
its block sizes, heads in all numbers, both forms; what is stored, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from backends.latent_form import LatentWidths, expanding_is_less
from backends.metadata import AttentionMetadata
from backends.npu import OPS
from backends.reference import REFERENCE
from npu_ops import latent
from npu_ops.attention import Lengths
from npu_ops.latent import batches, cut
from npu_ops.recording import TaskRecorder, recording
from tests.npu.device import HALVES, assert_near, host_ops, npu

L, R, D, V = 512, 64, 24, 20
STEPS = {
    "decode": ([1, 1, 1, 1], [1, 127, 128, 300]),
    "drafts": ([4, 1, 16, 3], [4, 200, 129, 26]),
    "chunks": ([17, 1, 40, 33], [17, 31, 140, 200]),
    "an-empty-row": ([3, 0, 20], [5, 0, 29]),
}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def step(query_lens: list[int], seq_lens: list[int], block_size: int, *, contiguous: bool = False) -> AttentionMetadata:
    """Sequences at blocks in any order from 1 on, or one behind the other."""
    counts = [-(-n // block_size) for n in seq_lens]
    ids = torch.arange(sum(counts)) + 1 if contiguous else torch.randperm(sum(counts)) + 1
    rows = ids.int().split(counts)
    places = [torch.arange(n - q, n) for q, n in zip(query_lens, seq_lens)]
    slots = [row[at // block_size] * block_size + at % block_size for row, at in zip(rows, places)]
    bases = torch.tensor([int(row[0]) if len(row) else 0 for row in rows], dtype=torch.int32)
    blocks = torch.zeros(len(rows), max(counts), dtype=torch.int32)
    for s, row in enumerate(rows):
        blocks[s, : len(row)] = row
    return AttentionMetadata(
        query_start_S1=torch.tensor([0, *query_lens]).cumsum(0).int(), seq_lens_S=torch.tensor(seq_lens).int(),
        block_table_SM=blocks[:, :0] if contiguous else blocks, kv_base_S=bases if contiguous else None,
        slot_mapping_T=torch.cat(slots).int(), max_query_len=max(query_lens), max_seq_len=max(seq_lens),
        num_tokens=sum(query_lens), block_size=block_size)


def caches(meta: AttentionMetadata, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of random numbers, with NaN in the blocks that no sequence has."""
    num_blocks = 2 + sum(-(-n // meta.block_size) for n in meta.seq_lens_S.tolist())
    shapes = npu().latent_cache_shapes(num_blocks, meta.block_size, L, R, dtype)
    assert shapes == ((num_blocks, meta.block_size, 1, L), (num_blocks, meta.block_size, 1, R))
    parts = torch.randn(shapes[0]).to(dtype), torch.randn(shapes[1]).to(dtype)
    for part in parts:
        part[[0, -1]] = float("nan")
    return parts


def of_the_cpu(parts: tuple[Tensor, Tensor]) -> Tensor:
    """One part, as the reference has it."""
    return torch.cat(parts, dim=-1).float().transpose(1, 2).contiguous()


@pytest.mark.parametrize(("heads", "dtype"), [(4, torch.bfloat16), (64, torch.float16), (130, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("block_size", [16, 128])
@pytest.mark.parametrize("name", STEPS)
def test_attention(name: str, block_size: int, heads: int, dtype: torch.dtype) -> None:
    meta = step(*STEPS[name], block_size)
    q_TNX = torch.randn(meta.num_tokens, heads, D + R).to(dtype)
    up_NYL, parts = (torch.randn(heads, D + V, L) / L**0.5).to(dtype), caches(meta, dtype)
    found = host_ops().latent_attention(q_TNX, up_NYL, parts, meta, scale=0.1)
    truth = REFERENCE.latent_attention(q_TNX.float(), up_NYL.float(), of_the_cpu(parts), meta, scale=0.1)
    assert found.dtype is dtype
    assert_near(found.view(-1, heads, V), truth.view(-1, heads, V), roundings=8)


class Taken:
    """What each form was launched for: lengths of the expanded batches, heads that were made, pieces."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.expanded: list[list[tuple[int, int]]] = []
        self.heads: list[int] = []
        self.num_pieces = 0
        packed, absorbed = latent.packed_attention, latent.latent_attention

        def watch_packed(*, lengths: Lengths, query_TNH: Tensor, **given: Any) -> Tensor:
            ends = zip([0, *lengths.query_ends], lengths.query_ends), zip([0, *lengths.kv_lens], lengths.kv_lens)
            self.expanded.append([(b - a, d - c) for (a, b), (c, d) in zip(*ends)])
            self.heads.append(query_TNH.shape[1])
            return packed(lengths=lengths, query_TNH=query_TNH, **given)

        def watch_absorbed(*, lengths: Any, **given: Any) -> Tensor:
            self.num_pieces += len(lengths().query_ends)
            return absorbed(lengths=lengths, **given)

        monkeypatch.setattr(latent, "packed_attention", watch_packed)
        monkeypatch.setattr(latent, "latent_attention", watch_absorbed)


PROMPTS = ([20, 130], [20, 130])
MIXED = ([1, 40, 17, 33, 1, 0, 180, 3], [200, 40, 31, 33, 130, 12, 200, 3])  # the third has 14 positions behind it


@pytest.mark.parametrize("most_bytes", [2**27, 120 * 4 * 640], ids=["together", "apart"])
@pytest.mark.parametrize(("key_dim", "value_dim"), [(128, 128), (192, 256)], ids=["192-128", "256-256"])
@pytest.mark.parametrize("lengths", [PROMPTS, MIXED], ids=["prompts", "mixed"])
def test_both_forms(lengths: tuple[list[int], list[int]], key_dim: int, value_dim: int, most_bytes: int,
                    monkeypatch: pytest.MonkeyPatch) -> None:
    """A sequence is expanded where that is less work, whatever lies beside it, and if need be some heads at a time."""
    monkeypatch.setattr(latent, "MADE_BYTES", most_bytes)
    meta, taken, heads = step(*lengths, 16), Taken(monkeypatch), 4
    q_TNX = torch.randn(meta.num_tokens, heads, key_dim + R).half()
    up_NYL, parts = (torch.randn(heads, key_dim + value_dim, L) / L**0.5).half(), caches(meta, torch.half)
    found = host_ops().latent_attention(q_TNX, up_NYL, parts, meta, scale=0.05)
    truth = REFERENCE.latent_attention(q_TNX.float(), up_NYL.float(), of_the_cpu(parts), meta, scale=0.05)
    assert_near(found.view(-1, heads, value_dim), truth.view(-1, heads, value_dim), roundings=8)
    pairs = list(zip(*lengths))
    expanded = [pair for pair in pairs if pair[0] > 16 and expanding_is_less(*pair, key_dim, value_dim, L)]
    assert expanded == ([(20, 20), (130, 130)] if lengths is PROMPTS else [(40, 40), (33, 33), (180, 200)])
    assert taken.num_pieces == sum(-(-q // 16) for q, kv in pairs if (q, kv) not in expanded)
    if most_bytes == 2**27:
        assert (taken.expanded, taken.heads) == ([expanded], [heads])
    else:
        assert len(taken.expanded) > 1 and min(taken.heads) < heads
        assert all(sum(kv for _, kv in each) * n * 2 * (key_dim + R + value_dim) <= most_bytes
                   for each, n in zip(taken.expanded, taken.heads))
        assert sum(n * len(each) for each, n in zip(taken.expanded, taken.heads)) == heads * len(expanded)


@pytest.mark.parametrize("most_bytes", [2**27, 120 * 4 * 640, 500 * 640], ids=["together", "apart", "head by head"])
def test_what_is_planned_for_is_what_is_taken(most_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the allocator: not much less, and more by queries and results at most, which others count."""
    monkeypatch.setattr(latent, "MADE_BYTES", most_bytes)
    meta, heads, taken, attend = step([400, 100], [400, 100], 16), 4, [], latent.attend_expanded

    def measured(**given: Any) -> Tensor:
        torch.npu.reset_peak_memory_stats()
        before = torch.npu.memory_allocated()
        out_TX = attend(**given)
        others = len(out_TX) * heads * (128 + R + 2 * 128) * 2
        taken.append((torch.npu.max_memory_allocated() - before, others))
        return out_TX

    monkeypatch.setattr(latent, "attend_expanded", measured)
    q_TNX, up_NYL = torch.randn(500, heads, 128 + R).half(), (torch.randn(heads, 256, L) / L**0.5).half()
    host_ops().latent_attention(q_TNX, up_NYL, caches(meta, torch.half), meta, scale=0.05)
    widths = LatentWidths(num_heads=heads, key=128, rotated=R, value=128, latent=L, number_bytes=2)
    planned = npu().expanded_bytes(widths, num_positions=500, longest=400)
    assert len(taken) == (1 if most_bytes == 2**27 else 2)
    assert 0.6 * planned < max(most for most, _ in taken) and all(most <= planned + others for most, others in taken)


@pytest.mark.parametrize(("longest", "num_heads", "expected"), [
    (8192, 128, 8192 * 576 * 2 + 2 * 2**27), (131_072, 128, 131_072 * 576 * 2 + 2 * 2**27),
    (500_000, 16, 500_000 * (576 * 2 + 2 * 640)), (100, 16, 1600 * (576 * 2 + 2 * 16 * 640)),
])
def test_what_is_planned_for_at_the_sizes_of_deepseek(longest: int, num_heads: int, expected: int) -> None:
    """Of 16 sequences: what is made of some heads, or of one where that is more, or of all there is."""
    widths = LatentWidths(num_heads=num_heads, key=128, rotated=64, value=128, latent=512, number_bytes=2)
    assert npu().expanded_bytes(widths, num_positions=16 * longest, longest=longest) == expected


def test_nothing_is_planned_for_widths_that_are_absorbed() -> None:
    widths = LatentWidths(num_heads=16, key=64, rotated=64, value=64, latent=512, number_bytes=2)
    assert npu().expanded_bytes(widths, num_positions=1000, longest=100) == 0


@pytest.mark.parametrize(("key_dim", "value_dim"), [(D, V), (64, 64)], ids=str)
def test_widths_that_are_absorbed_alone(key_dim: int, value_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator takes keys of 128 with values of 128, not of 64."""
    meta, taken = step(*PROMPTS, 16), Taken(monkeypatch)
    out = host_ops().latent_attention(torch.randn(meta.num_tokens, 2, key_dim + R).half(),
                                      torch.randn(2, key_dim + value_dim, L).half(), caches(meta, torch.half), meta,
                                      scale=0.01)
    assert out.isfinite().all() and not taken.expanded and taken.num_pieces == 2 + 9


def test_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of how many sequences, and how many of 8 heads at once, where 100 numbers may be there."""
    monkeypatch.setattr(latent, "MADE_BYTES", 100)
    assert batches([5, 7, 1, 30, 2, 2, 200], 1, 8) == [(2, 8), (1, 8), (1, 3), (2, 8), (1, 1)]
    monkeypatch.setattr(latent, "MADE_SEQUENCES", 2)
    assert batches([1] * 5, 1, 8) == [(2, 8), (2, 8), (1, 8)]


@pytest.mark.parametrize(("key_dim", "value_dim"), [(D, V), (128, 128)], ids=str)
def test_contiguous_blocks_give_the_same_bits_as_a_table(key_dim: int, value_dim: int) -> None:
    meta = step(*STEPS["chunks"], 16, contiguous=True)
    q_TNX = torch.randn(meta.num_tokens, 4, key_dim + R).half()
    up_NYL = torch.randn(4, key_dim + value_dim, L).half()
    parts, found = caches(meta, torch.float16), []
    width = int((meta.seq_lens_S.max() + 15) // 16)
    assert meta.kv_base_S is not None
    by_table = replace(meta, kv_base_S=None, block_table_SM=meta.kv_base_S[:, None] + torch.arange(width).int())
    for each in (meta, by_table):
        found.append(host_ops().latent_attention(q_TNX, up_NYL, parts, each, scale=0.01))
    assert torch.equal(*found) and found[0].isfinite().all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_write(interleaved: bool, dtype: torch.dtype) -> None:
    """Of views, as the fused projection gives them. Tokens that are not wanted go to block 0, others nowhere else."""
    meta = step([1, 7, 20], [9, 7, 33], 16)
    slots_T, T = meta.slot_mapping_T.clone(), meta.num_tokens
    slots_T[[0, 5]] = -1
    meta = replace(meta, slot_mapping_T=slots_T)
    latent_TX, q_TNX = torch.randn(T, 5 + L + R).to(dtype)[:, 5:], torch.randn(T, 3, D + R).to(dtype)
    norm_L, positions_T = (1 + 0.2 * torch.randn(L)).to(dtype), torch.randint(0, 500, (T,), dtype=torch.int32)
    angles = torch.arange(500.0)[:, None] / 50.0 ** (torch.arange(R // 2) / (R // 2))
    cos_sin, ways = torch.cat((angles.cos(), angles.sin()), dim=1), {"eps": 1e-6, "interleaved": interleaved}
    parts = caches(meta, dtype)
    expected, before = of_the_cpu(parts), [part.clone() for part in parts]
    q_truth = REFERENCE.latent_rope_write(latent_TX.float(), q_TNX.float(), positions_T, cos_sin, expected, meta,
                                          norm_weight_L=norm_L.float(), **ways)
    q = host_ops().latent_rope_write(latent_TX, q_TNX, positions_T, cos_sin, parts, meta, norm_weight_L=norm_L, **ways)
    assert_near(q[..., D:], q_truth[..., D:], roundings=8)
    assert torch.equal(q[..., :D], q_TNX[..., :D])
    written = slots_T[slots_T >= 0].long()
    truths = expected.transpose(1, 2).split([L, R], dim=-1)
    for part, old, truth in zip(parts, before, truths):
        rows, others = part.flatten(0, 1), torch.ones(len(part) * 16, dtype=torch.bool)
        assert_near(rows[written], truth.flatten(0, 1)[written], roundings=8)
        others[written], others[:16] = False, False
        assert torch.equal(rows[others].view(torch.int16), old.flatten(0, 1)[others].view(torch.int16))


@pytest.mark.parametrize("form", ["fp16", "int8", "fp8"])
def test_stored_latents(form: str) -> None:
    """A latent and its rotated part have scales of their own: large numbers in the one leave the other as fine."""
    parts, sizes = caches(step([1], [60], 16), torch.float16), {"fp16": 2 * 576, "int8": 576 + 8, "fp8": 576 + 2}
    parts[1].mul_(100)
    back: Any = tuple(torch.zeros_like(part) for part in parts)
    num_bytes = OPS.stored_bytes(parts, format=form)
    assert num_bytes == 16 * sizes[form]
    stored, ids, slots = torch.zeros(4, num_bytes, dtype=torch.uint8), torch.tensor([3, 1]), torch.tensor([0, 2])
    host_ops().export_blocks(parts, ids, stored, slots, format=form)
    host_ops().import_blocks(back, torch.tensor([4, 2]), stored, slots, format=form)
    for part, found in zip(parts, back):
        error = (found[[4, 2]].float() - part[[3, 1]].float()).abs() / part[[3, 1]].float().abs().amax(-1, keepdim=True)
        assert float(error.max()) <= {"fp16": 0.0, "int8": 0.005, "fp8": 2.0**-4}[form]
        assert not found[[0, 1, 3]].any()


def test_pieces() -> None:
    """Each with as many keys as lie before its last query, and it."""
    found = cut(Lengths([1, 18, 18, 34, 67], [9, 30, 0, 16, 40]))
    assert found.sequences == [0, 1, 1, 3, 4, 4, 4]
    assert found.lengths == Lengths([1, 17, 18, 34, 50, 66, 67], [9, 29, 30, 16, 23, 39, 40])


@pytest.mark.parametrize(("sizes", "words"), [
    ((128, 448, 64), "latents of 512 numbers and 64 rotated ones, not of 448 and 64"),
    ((128, 512, 32), "512 numbers and 64 rotated ones, not of 512 and 32"),
    ((256, 512, 64), "blocks of 16 or 128 tokens, not of 256"),
])
def test_sizes_that_it_lacks(sizes: tuple[int, int, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        npu().latent_cache_shapes(4, *sizes, torch.float16)


@pytest.mark.parametrize("contiguous", [False, True], ids=["table", "base"])
@pytest.mark.parametrize("name", ["decode", "chunks"])
def test_blocks_that_lie_apart(name: str, contiguous: bool) -> None:
    """Those of both parts by as many: the same bits as one behind the other, and nothing of what lies between."""
    meta = step(*STEPS[name], 16, contiguous=contiguous)
    q_TNX, up_NYL = torch.randn(meta.num_tokens, 4, 128 + R).half(), torch.randn(4, 256, L).half()
    parts = caches(meta, torch.half)
    apart: Any = tuple(torch.full((len(part) * 3, *part.shape[1:]), float("nan"), dtype=torch.half)[2::3].copy_(part)
                       for part in parts)
    found = [host_ops().latent_attention(q_TNX, up_NYL, each, meta, scale=0.01) for each in (parts, apart)]
    assert torch.equal(*found) and found[0].isfinite().all()


def test_parts_that_lie_apart_by_other_numbers_of_blocks() -> None:
    meta = step([1], [3], 16)
    parts = caches(meta, torch.float16)
    apart = torch.zeros(6, *parts[1].shape[1:], dtype=torch.float16)[::2]
    with pytest.raises(ValueError, match="not 1 and 2"):
        OPS.latent_attention(torch.zeros(1, 4, D + R).half(), torch.zeros(4, D + V, L).half(), (parts[0], apart), meta,
                             scale=1.0)


def test_a_graph_of_chunks_is_refused() -> None:
    """How many pieces they have differs from step to step."""
    meta = replace(step([1, 1], [3, 5], 16), max_query_len=17)
    with recording(TaskRecorder()), pytest.raises(RuntimeError, match="up to 16 tokens of a sequence, not 17"):
        OPS.latent_attention(torch.zeros(2, 4, D + R).half(), torch.zeros(4, D + V, L).half(),
                             caches(meta, torch.float16), meta, scale=1.0)
