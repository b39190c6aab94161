"""Attention over the paged cache against float64, in all shapes of steps; the form for latent caches."""

from __future__ import annotations

import pytest
import torch

from npu_ops.attention import Lengths, causal_mask, latent_attention
from npu_ops.contract import ContractError
from tests.npu.device import HALVES, assert_near, attend, npu, paged

P = 128
STEPS = {
    "decode": ([1, 1, 1, 1, 1], [1, P - 1, P, P + 1, 300]),
    "prefill": ([1, P - 1, P, P + 1], [1, P - 1, P, P + 1]),
    "chunk": ([5, 33, 64], [170, 40, 450]),
    "mixed": ([1, 40, 1, 7], [17, 40, 600, 131]),
    "drafts": ([4, 1, 4, 3], [4, 200, 129, 260]),
}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def check(case, window: int | None = None) -> None:
    q_TNH = case.queries().to(case.k_cache.dtype)
    found = attend(case, q_TNH, window)
    assert found.dtype is q_TNH.dtype
    assert_near(found.view(q_TNH.shape), case.truth(q_TNH, window).view(q_TNH.shape), roundings=4)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("heads", [(1, 1), (8, 2), (7, 1)], ids=lambda h: f"N{h[0]}-K{h[1]}")
@pytest.mark.parametrize("step", STEPS)
def test_steps(step: str, heads: tuple[int, int], dtype: torch.dtype) -> None:
    check(paged(*STEPS[step], heads=heads, dtype=dtype))


@pytest.mark.parametrize("head_dim", [16, 80, 128, 256])
@pytest.mark.parametrize("block_size", [128, 256, 384])
def test_sizes(head_dim: int, block_size: int) -> None:
    check(paged(*STEPS["mixed"], head_dim=head_dim, block_size=block_size))


@pytest.mark.parametrize("window", [1, 16, 130, 5000])
@pytest.mark.parametrize("step", STEPS)
def test_windows(step: str, window: int) -> None:
    check(paged(*STEPS[step]), window)


@pytest.mark.parametrize("every", [1, 2, 5])
@pytest.mark.parametrize("step", ["decode", "mixed"])
def test_contiguous_blocks_give_the_same_bits_as_a_table(step: str, every: int) -> None:
    """Blocks of one layer lie apart where a page holds those of several."""
    case = paged(*STEPS[step], contiguous=True, every=every)
    q_TNH = case.queries().bfloat16()
    by_base = attend(case, q_TNH)
    assert_near(by_base.view(q_TNH.shape), case.truth(q_TNH).view(q_TNH.shape), roundings=4)
    case.by_table()
    assert torch.equal(attend(case, q_TNH), by_base)


def test_blocks_that_lie_apart_by_no_whole_blocks() -> None:
    case = paged([1], [3])
    case.k_cache = case.k_cache.new_zeros(4, 128 * 2 * 64 + 64)[:, :-64].view(4, 128, 2, 64)
    with pytest.raises(ValueError, match="kv_layout paged"):
        attend(case, case.queries().bfloat16())


def test_large_scores_do_not_overflow() -> None:
    case = paged(*STEPS["chunk"])
    q_TNH = (case.queries() * 300).bfloat16()
    assert_near(attend(case, q_TNH).view(q_TNH.shape), case.truth(q_TNH).view(q_TNH.shape), roundings=4)


def test_float32_is_refused() -> None:
    case = paged([1], [3]).to(torch.float32)
    with pytest.raises(ContractError, match="dtype float16, bfloat16"):
        attend(case, case.queries())


@pytest.mark.parametrize("block_size", [16, 64, 100, 640])
def test_block_sizes_that_it_lacks(block_size: int) -> None:
    with pytest.raises(ValueError, match=f"of 128, 256, 384, 512 tokens, not of {block_size}"):
        npu().kv_cache_shape(4, block_size, 2, 64)


@pytest.mark.parametrize(("num_kv_heads", "head_dim", "words"), [(2, 24, "multiple of 16"), (2, 528, "up to 512"),
                                                                 (512, 128, "65535")])
def test_heads_that_it_lacks(num_kv_heads: int, head_dim: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        npu().kv_cache_shape(4, 128, num_kv_heads, head_dim)


def test_the_mask_is_the_fixed_triangle() -> None:
    mask = causal_mask(npu().device).cpu()
    assert mask.dtype is torch.int8 and mask.shape == (2048, 2048)
    assert torch.equal(mask.bool(), torch.ones(2048, 2048).triu(1).bool())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("block_size", [16, 128])
def test_latent_attention(block_size: int, dtype: torch.dtype) -> None:
    """One key head of 512 numbers and 64 rotated ones, which only score; up to 16 tokens a sequence."""
    device, N = npu().device, 32
    query_lens, seq_lens = [1, 3, 16], [40, 150, 16]
    counts = [-(-n // block_size) for n in seq_lens]
    ids = torch.randperm(sum(counts), dtype=torch.int32) + 1
    table = torch.zeros(3, max(counts), dtype=torch.int32)
    for s, count in enumerate(counts):
        table[s, :count] = ids[sum(counts[:s]):][:count]
    num_blocks, T = sum(counts) + 1, sum(query_lens)
    keys, ropes = (torch.randn(num_blocks, block_size, n).to(dtype) for n in (512, 64))
    query, query_rope = (torch.randn(T, N, n).to(dtype) for n in (512, 64))
    lengths = Lengths([1, 4, 20], seq_lens)
    scale = 192**-0.5
    out = latent_attention(query_TNL=query.to(device), query_rope_TNR=query_rope.to(device), key_BPL=keys.to(device),
                           key_rope_BPR=ropes.to(device), block_table_SM=table.to(device), lengths=lambda: lengths,
                           scale=scale)
    truth, t = [], 0
    for s, (query_len, seq_len) in enumerate(zip(query_lens, seq_lens)):
        rows = table[s, : counts[s]].long()
        k, r = (x[rows].flatten(0, 1)[:seq_len].double() for x in (keys, ropes))
        q, qr = (x[t : t + query_len].double() for x in (query, query_rope))
        scores = (torch.einsum("qnl,cl->nqc", q, k) + torch.einsum("qnr,cr->nqc", qr, r)) * scale
        seen = torch.arange(seq_len) <= torch.arange(seq_len - query_len, seq_len)[:, None]
        truth.append(torch.einsum("nqc,cl->nql", scores.masked_fill(~seen, float("-inf")).softmax(-1), k))
        t += query_len
    assert_near(out, torch.cat(truth, 1), roundings=4)
