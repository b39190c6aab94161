"""Norms, activation, rotary embedding with its cache write, and block copies, against float64 truth."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from backends.metadata import AttentionMetadata
from backends.opset import OpSet
from tests.ops.conftest import NAN, layout_of, sizes, spread_cache

EPS = 1e-6
SHAPES = [(1, 1), (3, 33), (5, 512), sizes([(300, 500)], [(2, 500)])[0], (0, 8), (2, 3000)]


def norm_truth(x: Tensor, weight: Tensor) -> Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


def assert_near(actual: Tensor, truth: Tensor, atol: float = 2e-6) -> None:
    torch.testing.assert_close(actual.double(), truth.double(), rtol=1e-6, atol=atol)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm(ops: OpSet, shape: tuple[int, int]) -> None:
    x, weight = torch.randn(shape), torch.randn(shape[1])
    before = x.clone()
    assert_near(ops.rms_norm(x, weight, EPS), norm_truth(x, weight))
    assert torch.equal(x, before)


def test_rms_norm_of_rows_that_lie_apart(ops: OpSet) -> None:
    x, weight = torch.full((5, 100), NAN), torch.randn(64)
    x[:, 7:71] = torch.randn(5, 64)
    assert_near(ops.rms_norm(x[:, 7:71], weight, EPS), norm_truth(x[:, 7:71], weight))


def test_rms_norm_of_heads(ops: OpSet) -> None:
    x, weight = torch.randn(5, 3, 40), torch.randn(40)
    assert_near(ops.rms_norm(x, weight, EPS), norm_truth(x, weight))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_add_rms_norm(ops: OpSet, shape: tuple[int, int]) -> None:
    x, residual, weight = torch.randn(shape), torch.randn(shape), torch.randn(shape[1])
    total = x + residual
    out = ops.add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(residual, total)
    assert_near(out, norm_truth(total, weight))


def test_nan_reaches_its_own_row_only(ops: OpSet) -> None:
    x = torch.randn(3, 64)
    x[1, 5] = NAN
    for out in (ops.rms_norm(x, torch.ones(64), EPS), ops.silu_mul(x.clone())):
        assert out[1].isnan().any()
        assert out[[0, 2]].isfinite().all()


@pytest.mark.parametrize("shape", [(1, 1), (3, 33), (7, 1536), sizes([(200, 300)], [(2, 300)])[0], (0, 8)], ids=str)
def test_silu_mul(ops: OpSet, shape: tuple[int, int]) -> None:
    x = torch.randn(shape[0], 2 * shape[1]) * 10
    gate, up = x.double().chunk(2, -1)
    assert_near(ops.silu_mul(x.clone()), gate / (1 + (-gate).exp()) * up, atol=1e-5)


def test_silu_mul_of_extremes(ops: OpSet) -> None:
    gate = torch.tensor([-1e30, -200.0, -88.0, 0.0, 88.0, 1e30] * 8)
    out = ops.silu_mul(torch.cat((gate, torch.ones_like(gate)))[None])
    assert_near(out, torch.nn.functional.silu(gate.double())[None])


def rope_case(num_tokens: int, N: int, K: int, H: int, P: int) -> tuple[Tensor, Tensor, Tensor, AttentionMetadata]:
    """qkv, positions, cos_sin and metadata; every third token has no slot."""
    num_slots = (num_tokens // P + 2) * P
    slots = torch.randperm(num_slots)[:num_tokens].int()
    slots[::3] = -1
    positions = torch.randint(0, 500, (num_tokens,), dtype=torch.int32)
    angles = torch.arange(500)[:, None] * 10000.0 ** (-torch.arange(H // 2) / (H // 2))
    unused = torch.zeros(2, dtype=torch.int32)
    meta = AttentionMetadata(query_start_S1=unused, seq_lens_S=unused[:1], block_table_SM=unused[None], block_size=P,
                             slot_mapping_T=slots, max_query_len=1, max_seq_len=1, num_tokens=num_tokens)  # fmt: skip
    return torch.randn(num_tokens, (N + 2 * K) * H), positions, torch.cat((angles.cos(), angles.sin()), 1).float(), meta


# Tokens, query heads, kv heads, head dim, tokens a block.
ROPE_SHAPES = sizes(
    [(*shape, block_size) for shape in ((1, 1, 1, 64), (7, 4, 2, 32), (5, 7, 1, 80), (90, 8, 2, 128), (3, 2, 2, 6))
     for block_size in (1, 5, 16, 128)],
    [(1, 1, 1, 64, 16), (7, 4, 2, 32, 5), (5, 7, 1, 80, 1), (4, 8, 2, 128, 128), (3, 2, 2, 6, 16)])  # fmt: skip


@pytest.mark.parametrize("norms", ["", "qk", "q", "k"])
@pytest.mark.parametrize("shape", ROPE_SHAPES, ids=str)
def test_qkv_rope_write(ops: OpSet, shape: tuple[int, int, int, int, int], norms: str) -> None:
    T, N, K, H, block_size = shape
    qkv, positions, cos_sin, meta = rope_case(T, N, K, H, block_size)
    heads = qkv.clone().view(T, N + 2 * K, H).double()
    q_norm, k_norm = (torch.randn(H) if name in norms else None for name in "qk")
    k_cache = spread_cache(ops, T // block_size + 2, block_size, K, H, gap=11)
    v_cache = spread_cache(ops, T // block_size + 2, block_size, K, H, gap=5)

    q_TNH = ops.qkv_rope_write(qkv, positions, cos_sin, k_cache, v_cache, meta, num_heads=N, num_kv_heads=K, head_dim=H,
                               q_norm_H=q_norm, k_norm_H=k_norm, eps=EPS)  # fmt: skip

    def turn(x: Tensor, weight: Tensor | None) -> Tensor:
        x = x if weight is None else norm_truth(x, weight)
        half = H // 2
        cos, sin = cos_sin[positions.long()].double()[:, None].chunk(2, -1)
        return torch.cat((x[..., :half] * cos - x[..., half:] * sin, x[..., half:] * cos + x[..., :half] * sin), -1)

    assert_near(q_TNH, turn(heads[:, :N], q_norm))
    keys, values = turn(heads[:, N : N + K], k_norm), heads[:, N + K :]
    written = meta.slot_mapping_T >= 0
    slots = meta.slot_mapping_T[written].long()
    blocks, offsets, layout = slots // block_size, slots % block_size, layout_of(ops)
    assert_near(layout.keys(k_cache)[blocks, :, offsets], keys[written])
    assert_near(layout.values(v_cache)[blocks, :, offsets], values[written], atol=0)
    assert k_cache.isfinite().sum() == v_cache.isfinite().sum() == written.sum() * K * H


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(ops: OpSet, dtype: torch.dtype) -> None:
    """Within the last bit of each rounding; the interpreter rounds bfloat16 towards zero."""
    bit = torch.finfo(dtype).eps
    x, residual, weight = (torch.randn(s).to(dtype) for s in ((4, 32), (4, 32), (32,)))
    total = x + residual
    results = [
        (ops.rms_norm(x, weight, EPS), norm_truth(x, weight)),
        (ops.silu_mul(x), torch.nn.functional.silu(x[:, :16].double()) * x[:, 16:].double()),
        (ops.add_rms_norm(x.clone(), residual, weight, EPS), norm_truth(total, weight)),
        (residual, total),
    ]
    for out, truth in results:
        assert out.dtype is dtype
        torch.testing.assert_close(out.double(), truth.double(), rtol=3 * bit, atol=bit)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rope_in_half_precision(ops: OpSet, dtype: torch.dtype) -> None:
    qkv, positions, cos_sin, meta = rope_case(5, 2, 1, 32, 16)
    k_cache, v_cache = (torch.zeros(layout_of(ops).shape(4, 16, 1, 32), dtype=dtype) for _ in range(2))
    exact = ops.qkv_rope_write(qkv.clone(), positions, cos_sin, k_cache.float(), v_cache.float(), meta, num_heads=2,
                               num_kv_heads=1, head_dim=32)  # fmt: skip
    q_TNH = ops.qkv_rope_write(qkv.to(dtype), positions, cos_sin, k_cache, v_cache, meta, num_heads=2, num_kv_heads=1,
                               head_dim=32)  # fmt: skip
    assert q_TNH.dtype is dtype
    bit = torch.finfo(dtype).eps
    torch.testing.assert_close(q_TNH.double(), exact.double(), rtol=2 * bit, atol=4 * bit)


@pytest.mark.parametrize(("shape", "gap"), [((4, 2, 8), 0), ((4, 2, 8), 7), ((128, 3, 32), 5)], ids=str)
def test_copy_blocks(ops: OpSet, shape: tuple[int, int, int], gap: int) -> None:
    P, K, H = shape
    cache = spread_cache(ops, 6, P, K, H, gap).normal_()
    memory = torch.as_strided(cache, (5, cache.stride(0)), (cache.stride(0), 1))
    before = cache.clone()
    ops.copy_blocks(cache, torch.tensor([0, 0, 3]), torch.tensor([1, 5, 2]))
    assert torch.equal(cache, before[[0, 0, 3, 3, 4, 0]])
    assert memory[:, K * P * H :].isnan().all()


@pytest.mark.parametrize("num_tokens", [0, 1, 300])
def test_feed_tokens(ops: OpSet, num_tokens: int) -> None:
    known, sampled = torch.randint(0, 99, (num_tokens,), dtype=torch.int32), torch.randint(-1, 99, (37,))
    feed = torch.randint(-1, 37, (num_tokens,), dtype=torch.int32)
    found = ops.feed_tokens(known, feed, sampled)
    assert found.dtype is torch.int32
    expected = [max(int(sampled[f]), 0) if f >= 0 else int(token) for f, token in zip(feed.tolist(), known)]
    assert found.tolist() == expected
