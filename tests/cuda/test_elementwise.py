"""Norms, activation, the rotary kernel with its cache write, and block copies, against float64 truth."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from backends.opset import OpSet
from tests.ops.conftest import NAN, spread_cache
from tests.ops.test_elementwise import EPS, assert_near, norm_truth, rope_case

SHAPES = [(1, 1), (3, 33), (5, 512), (0, 8), (2, 3000)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm(ops: OpSet, shape: tuple[int, int]) -> None:
    x, weight = torch.randn(shape), torch.randn(shape[1])
    before = x.clone()
    assert_near(ops.rms_norm(x, weight, EPS), norm_truth(x, weight))
    assert torch.equal(x, before)


def test_rms_norm_of_heads(ops: OpSet) -> None:
    x, weight = torch.randn(2, 3, 40), torch.randn(40)
    assert_near(ops.rms_norm(x, weight, EPS), norm_truth(x, weight))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_add_rms_norm(ops: OpSet, shape: tuple[int, int]) -> None:
    x, residual, weight = torch.randn(shape), torch.randn(shape), torch.randn(shape[1])
    total = x + residual
    out = ops.add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(residual, total)
    assert_near(out, norm_truth(total, weight))


@pytest.mark.parametrize("shape", [(1, 1), (3, 33), (2, 1536), (0, 8)], ids=str)
def test_silu_mul(ops: OpSet, shape: tuple[int, int]) -> None:
    x = torch.randn(shape[0], 2 * shape[1]) * 10
    gate, up = x.double().chunk(2, -1)
    assert_near(ops.silu_mul(x.clone()), gate / (1 + (-gate).exp()) * up, atol=1e-5)


def test_silu_mul_of_extremes(ops: OpSet) -> None:
    gate = torch.tensor([-1e30, -200.0, -88.0, 0.0, 88.0, 1e30] * 8)
    out = ops.silu_mul(torch.cat((gate, torch.ones_like(gate)))[None])
    assert_near(out, torch.nn.functional.silu(gate.double())[None])


def test_nan_reaches_its_own_row_only(ops: OpSet) -> None:
    x = torch.randn(3, 64)
    x[1, 5] = NAN
    for out in (ops.rms_norm(x, torch.ones(64), EPS), ops.silu_mul(x.clone())):
        assert out[1].isnan().any()
        assert out[[0, 2]].isfinite().all()


@pytest.mark.parametrize("norms", ["", "qk", "q", "k"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 64, 16), (7, 4, 2, 32, 5), (5, 7, 1, 80, 1), (4, 8, 2, 128, 128),
                                   (3, 2, 2, 6, 16)], ids=str)  # fmt: skip
def test_qkv_rope_write(ops: OpSet, shape: tuple[int, int, int, int, int], norms: str) -> None:
    T, N, K, H, block_size = shape
    qkv, positions, cos_sin, meta = rope_case(T, N, K, H, block_size)
    heads = qkv.clone().view(T, N + 2 * K, H).double()
    q_norm, k_norm = (torch.randn(H) if name in norms else None for name in "qk")
    k_cache = spread_cache(T // block_size + 2, block_size, K, H, gap=11)
    v_cache = spread_cache(T // block_size + 2, block_size, K, H, gap=5)

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
    blocks, offsets = slots // block_size, slots % block_size
    assert_near(k_cache[blocks, :, offsets], keys[written])
    assert_near(v_cache[blocks, :, offsets], values[written], atol=0)
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


@pytest.mark.parametrize(("shape", "gap"), [((4, 2, 8), 0), ((4, 2, 8), 7), ((128, 3, 32), 5)], ids=str)
def test_copy_blocks(ops: OpSet, shape: tuple[int, int, int], gap: int) -> None:
    P, K, H = shape
    cache = spread_cache(6, P, K, H, gap).normal_()
    memory = torch.as_strided(cache, (5, cache.stride(0)), (cache.stride(0), 1))
    before = cache.clone()
    ops.copy_blocks(cache, torch.tensor([0, 0, 3]), torch.tensor([1, 5, 2]))
    assert torch.equal(cache, before[[0, 0, 3, 3, 4, 0]])
    assert memory[:, K * P * H :].isnan().all()
