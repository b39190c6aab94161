"""The number of threads changes nothing: work that is large enough to be shared gives the same bits; and copies from
several threads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from backends.opset import OpSet
from backends.reference import REFERENCE
from tests.ops.conftest import NAN, Paged
from tests.ops.test_transfer import Store, caches, copy_in_threads


def linear(ops: OpSet) -> Tensor:
    packed = ops.pack_linear(torch.randn(300, 200))
    return torch.cat([ops.linear(torch.randn(rows, 200), packed) for rows in (1, 9, 100)])


def int8_linear(ops: OpSet) -> Tensor:
    packed = ops.pack_linear(torch.randn(300, 200), quantization="int8")
    return torch.cat([ops.linear(torch.randn(rows, 200), packed) for rows in (1, 9, 100)])


def fp8_linear(ops: OpSet) -> Tensor:
    packed = ops.pack_linear(torch.randn(300, 200), quantization="fp8")
    return torch.cat([ops.linear(torch.randn(rows, 200), packed) for rows in (1, 9, 100)])


def w8a8_linear(ops: OpSet) -> Tensor:
    packed = ops.pack_linear(torch.randn(700, 400), quantization="w8a8")
    return torch.cat([ops.linear(torch.randn(rows, 400), packed) for rows in (1, 2, 9, 100)])


def attention(ops: OpSet) -> Tensor:
    case = Paged(ops=ops, query_lens=[1, 90, 1, 1], seq_lens=[700, 200, 33, 600], num_heads=6, num_kv_heads=2,
                 head_dim=32, block_size=16)  # fmt: skip
    return torch.cat((case.attend(ops, case.queries()), case.attend(ops, case.queries(), window=100)))


def norms(ops: OpSet) -> Tensor:
    x = torch.randn(300, 512)
    return torch.cat((ops.rms_norm(x, torch.randn(512), 1e-6), ops.add_rms_norm(x.clone(), x, torch.randn(512), 1e-6)))


def silu(ops: OpSet) -> Tensor:
    return ops.silu_mul(torch.randn(200, 1000))


def sampling(ops: OpSet) -> Tensor:
    logits, ones = torch.randn(9, 9000), torch.ones(9)
    drawn = ops.sample(logits.clone(), ones, torch.full((9,), 500), ones * 0.9, ones * 0.001, torch.rand(9))
    return torch.stack((ops.argmax(logits), drawn))


@pytest.mark.parametrize("work", [linear, int8_linear, fp8_linear, w8a8_linear, attention, norms, silu, sampling])
def test_threads(op_sets: dict[str, OpSet], work: Callable[[OpSet], Tensor]) -> None:
    if "compiled" not in op_sets:
        pytest.skip("no C compiler here")
    results = []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        torch.manual_seed(1)
        results.append(work(op_sets["compiled"]))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_several_copying_threads_at_once(op_sets: dict[str, OpSet]) -> None:
    """Each with its own blocks and slots, in one store: the workers of two directions."""
    ops = op_sets.get("compiled", op_sets["torch"])
    k_cache, v_cache = caches(ops, (2, 16, 64), num_blocks=64)
    expected = Store(REFERENCE, k_cache, v_cache, "int8", 64)
    expected.export(k_cache, v_cache, list(range(64)), list(range(64)))
    store = Store(ops, k_cache, v_cache, "int8", 64)
    back = torch.full_like(k_cache, NAN), torch.full_like(v_cache, NAN)
    copy_in_threads(store, (k_cache, v_cache), back)
    assert torch.equal(store.payloads, expected.payloads)
    assert not back[0].isnan().any() and not back[1].isnan().any()
