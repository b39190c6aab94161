"""The NPU's copies of KV blocks that lie apart, on the CPU: no operator is given the view of all of them.

CANN makes such a view dense first, for which it copies all of it, memory that is not mapped included.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from npu_ops import kv

NUM_BLOCKS, EVERY = 7, 3
SHAPE = (128, 2, 16)


class NoViewOfAll(TorchDispatchMode):
    """Refuses operators that compute with a tensor of blocks that lie apart. num_ops: those that computed."""

    num_ops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [each for each in (*args, *(kwargs or {}).values()) if isinstance(each, Tensor)]
        if not func.is_view and func is not torch.ops.aten.new_empty.default:  # which takes its dtype and device
            self.num_ops += 1
            for tensor in tensors:
                assert tensor.dim() < 4 or len(tensor) < NUM_BLOCKS or tensor.is_contiguous(), f"{func} of all blocks"
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def unpinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a device there is nothing to pin for."""
    monkeypatch.setattr(kv, "to_device", lambda ids_B, device: ids_B)


def caches(*, every: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    memory = torch.randn(NUM_BLOCKS, every, *SHAPE)
    return memory[:, 0], memory[:, every - 1].clone() if every == 1 else memory[:, every - 1]


@pytest.mark.parametrize("every", [1, EVERY])
def test_copies_between_blocks(every: int) -> None:
    cache, _ = caches(every=every)
    before, src, dst = cache.clone(), torch.tensor([5, 0]), torch.tensor([2, 6])
    with NoViewOfAll():
        kv.copy_blocks(cache, src, dst)
    before[dst] = before[src]
    assert torch.equal(cache, before)


@pytest.mark.parametrize("every", [1, EVERY])
@pytest.mark.parametrize("format", ["fp32", "bf16", "int8", "fp8"])
def test_the_stored_form_is_that_of_dense_blocks(every: int, format: str) -> None:
    apart, dense = caches(every=every), tuple(cache.clone() for cache in caches(every=every))
    num_bytes, blocks, slots = kv.stored_bytes(dense, format=format), torch.tensor([6, 1, 3]), torch.tensor([0, 2, 1])
    found, wanted = (torch.zeros(3, num_bytes, dtype=torch.uint8) for _ in range(2))
    with NoViewOfAll() as watch:
        kv.export_blocks(apart, blocks, found, slots, format=format)
    kv.export_blocks(dense, blocks, wanted, slots, format=format)
    assert watch.num_ops and found.any() and torch.equal(found, wanted)
    for cache in (*apart, *dense):
        cache.zero_()
    with NoViewOfAll():
        kv.import_blocks(apart, blocks, found, slots, format=format)
    kv.import_blocks(dense, blocks, wanted, slots, format=format)
    for a, b in zip(apart, dense):
        assert torch.equal(a, b) and (a[blocks] != 0).any() and not a[[0, 2, 4, 5]].any()


def test_the_watch_sees_a_view_of_all() -> None:
    with pytest.raises(AssertionError, match="index_select"), NoViewOfAll():
        caches(every=EVERY)[0].index_select(0, torch.tensor([1]))
