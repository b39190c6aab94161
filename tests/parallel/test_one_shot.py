"""Which sums are one kernel's, and that torch has what they are made of. The kernel itself needs GPUs: not run here."""

from __future__ import annotations

import pytest
import torch

from backends.cuda_one_shot import MOST_BYTES, is_small, obstacle
from xllm.parallel.groups import Group


@pytest.mark.parametrize(("num_bytes", "dtype", "num_ranks", "expected"), [
    (8192, torch.bfloat16, 2, True), (4, torch.float32, 4, True), (2, torch.bfloat16, 2, False),
    (0, torch.bfloat16, 2, False), (8192, torch.float16, 2, False), (8192, torch.int32, 2, False),
    (512 << 10, torch.bfloat16, 4, True), ((512 << 10) + 4, torch.bfloat16, 4, False),
    (512 << 10, torch.bfloat16, 8, False), (8192, torch.bfloat16, 3, False), (8192, torch.bfloat16, 16, False),
])
def test_which_sums_are_small(num_bytes: int, dtype: torch.dtype, num_ranks: int, expected: bool) -> None:
    assert is_small(num_bytes, dtype, num_ranks) is expected


def test_this_torch_has_what_is_called() -> None:
    """By name and arguments, of which a build without CUDA has the schemas."""
    from torch.distributed import _symmetric_memory as symmetric

    assert callable(symmetric.empty) and callable(symmetric.rendezvous)
    schema = str(torch.ops.symm_mem.one_shot_all_reduce_out.default._schema)
    assert "(Tensor input, str reduce_op, str group_name, Tensor(a!) out)" in schema


def test_what_stands_in_the_way() -> None:
    assert obstacle(3) == "made for 2, 4, 8 ranks"
    if torch.cuda.device_count() < max(MOST_BYTES):
        assert obstacle(max(MOST_BYTES)) == f"{torch.cuda.device_count()} CUDA devices here"


def test_a_group_asks_for_each_tensor() -> None:
    class Small:
        """Takes what has two numbers, and says so in it."""

        def takes(self, x: torch.Tensor) -> bool:
            return x.numel() == 2

        def all_reduce(self, x: torch.Tensor) -> None:
            x.fill_(7.0)

    group = Group(0, 1, None)
    group._one_kernel = Small()  # type: ignore[assignment]
    assert group.all_reduce(torch.zeros(2)).tolist() == [7.0, 7.0]
    assert group.all_reduce(torch.zeros(3)).tolist() == [0.0] * 3
