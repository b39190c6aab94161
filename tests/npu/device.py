"""The device of these tests, and steps over its paged cache whose results are known."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from backends.npu import OPS, NpuBackend
from backends.opset import OpSet
from npu_ops.contract import set_checking
from tests.ops.conftest import Paged
from tests.ops.on_device import on_device

HALVES = [torch.bfloat16, torch.float16]
# Half a unit in the last place of a number, and what a few roundings in between may add.
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-22}


@cache
def _npu() -> NpuBackend:
    return NpuBackend(check_contracts=True)


def npu() -> NpuBackend:
    """The backend of this process, with contracts on."""
    set_checking(True)
    return _npu()


@cache
def host_ops() -> OpSet:
    """Its operators for tensors in host memory."""

    def synchronize() -> None:
        npu().synchronize_copies()
        npu().synchronize()

    return on_device(npu().ops, npu().device, synchronize)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype).to(npu().device)


def assert_near(actual: Tensor, truth: Tensor, *, roundings: float = 3.0) -> None:
    """actual within some roundings of its dtype, of each number and of the largest of its row."""
    unit = ROUNDING[actual.dtype] * roundings
    actual, truth = actual.cpu().double(), truth.cpu().double()
    row = truth.abs().amax(dim=-1, keepdim=True) if truth.ndim else truth.abs()
    assert actual.shape == truth.shape
    assert actual.isfinite().all() and ((actual - truth).abs() <= unit * (truth.abs() + row / 4)).all(), \
        ((actual - truth).abs() / unit).max()


def paged(query_lens: list[int], seq_lens: list[int], *, heads: tuple[int, int] = (4, 2), head_dim: int = 64,
          block_size: int = 128, dtype: torch.dtype = torch.bfloat16, contiguous: bool = False,
          every: int = 1) -> Paged:
    """Keys and values are numbers of `dtype`, and so is the truth about them. every: 2 leaves a block's room between
    blocks."""
    gap = (every - 1) * block_size * heads[1] * head_dim
    case = Paged(ops=OPS, query_lens=query_lens, seq_lens=seq_lens, num_heads=heads[0], num_kv_heads=heads[1],
                 head_dim=head_dim, block_size=block_size, contiguous=contiguous, gap=gap)  # fmt: skip
    case.keys = [x.to(dtype) for x in case.keys]
    case.values = [x.to(dtype) for x in case.values]
    case.k_cache, case.v_cache = (_spread_as(cache, dtype) for cache in (case.k_cache, case.v_cache))
    return case


def _spread_as(cache: Tensor, dtype: torch.dtype) -> Tensor:
    """The cache in another dtype, at the same strides."""
    memory = torch.full((len(cache) * cache.stride(0),), float("nan"), dtype=dtype)
    return memory.as_strided(cache.shape, cache.stride()).copy_(cache)


def attend(case: Paged, q_TNH: Tensor, window: int | None = None) -> Tensor:
    """Attention of a case whose tensors are in host memory."""
    ops = host_ops()
    case.meta.plan = None
    scale = case.head_dim**-0.5
    return ops.attention(q_TNH, case.k_cache, case.v_cache, case.meta, scale=scale, sliding_window=window)
