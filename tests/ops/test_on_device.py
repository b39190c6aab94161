"""`OnDevice` with host memory for a device's: whoever tests by it can trust it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from backends.opset import OpSet
from backends.reference import REFERENCE
from tests.ops.conftest import Paged, spread_cache
from tests.ops.on_device import on_device


@pytest.fixture
def ops() -> OpSet:
    return on_device(REFERENCE, torch.device("cpu"), lambda: None)


def test_what_is_written_comes_back_and_nothing_else_moves(ops: OpSet) -> None:
    cache = spread_cache(ops, 6, 4, 2, 8, gap=7).normal_()
    memory = torch.as_strided(cache, (5, cache.stride(0)), (cache.stride(0), 1))
    before = cache.clone()
    ops.copy_blocks(cache, torch.tensor([0, 3]), torch.tensor([1, 2]))
    assert torch.equal(cache, before[[0, 0, 3, 3, 4, 5]])
    assert memory[:, 64:].isnan().all()
    x, residual, weight = torch.randn(3, 8), torch.randn(3, 8), torch.ones(8)
    total = x + residual
    ops.add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(residual, total)


def test_no_tensor_of_the_test_reaches_the_operator() -> None:
    """But for those that the contract wants in host memory."""
    seen: dict[str, list[Any]] = {}

    def spy(name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            seen[name] = [*arguments, *options.values()]
            return getattr(REFERENCE, name)(*arguments, **options)

        return call

    names = ["attention", "linear", "export_blocks"]
    ops = on_device(replace(REFERENCE, **{name: spy(name) for name in names}), torch.device("cpu"), lambda: None)
    case = Paged(ops=ops, query_lens=[1, 3], seq_lens=[4, 9], num_heads=2, num_kv_heads=1, head_dim=8, block_size=4)
    q_TNH = case.queries()
    torch.testing.assert_close(case.attend(ops, q_TNH).double(), case.truth(q_TNH), rtol=0, atol=2e-6)
    assert seen["attention"][3].seq_lens_S is not case.meta.seq_lens_S
    weight = torch.randn(5, 8)
    torch.testing.assert_close(ops.linear(q_TNH[:, 0], ops.pack_linear(weight)), q_TNH[:, 0] @ weight.T)
    ids, stored = torch.tensor([1, 0]), torch.zeros(2, ops.stored_bytes((case.k_cache, case.v_cache), format="int8"),
                                                    dtype=torch.uint8)  # fmt: skip
    ops.export_blocks((case.k_cache, case.v_cache), ids, stored, ids, format="int8")
    mine = {t.data_ptr() for t in (q_TNH, case.k_cache, case.v_cache, weight)}
    tensors = [x for arguments in seen.values() for x in arguments if isinstance(x, Tensor)]
    assert not mine & {t.data_ptr() for t in tensors}
    assert any(t is stored for t in tensors) and any(t is ids for t in tensors)
