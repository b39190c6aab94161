"""What a layer of latents queues on the device, by the operators' names: nothing that waits for it, and no arithmetic
on numbers that only the device's few CPU cores compute with (AICPU, milliseconds a call): int64 and float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from backends.npu import plan
from tests.npu.device import npu, randn
from tests.npu.launches import launches
from tests.npu.test_latent import D, L, R, V, step

ANGLES, SLOTS = ["index_select", "to_copy", "cat", "cat"], ["clamp"]  # once a step
CLONES = ["clone", "clone"]  # of views: the operator wants dense tensors


def layer(heads: int) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Both operators of a layer, over two rows that decode."""
    device, dtype, ops = npu().device, torch.bfloat16, npu().ops
    meta = step([1, 1], [30, 7], 16)
    meta = replace(meta, block_table_SM=meta.block_table_SM.to(device), slot_mapping_T=meta.slot_mapping_T.to(device))
    meta.plan = plan(meta, num_heads=heads, num_kv_heads=1, head_dim=L + R)
    caches = [npu().allocate_kv_cache(shape, dtype) for shape in npu().latent_cache_shapes(5, 16, L, R, dtype)]
    latent_TX, q_TNX = randn(2, L + R, dtype=dtype), randn(2, heads, D + R, dtype=dtype)
    up_NYL, norm_L, cos_sin = randn(heads, D + V, L, dtype=dtype), randn(L, dtype=dtype), randn(50, R)
    positions_T = torch.tensor([29, 6], dtype=torch.int32, device=device)
    return (lambda: ops.latent_rope_write(latent_TX, q_TNX, positions_T, cos_sin, caches, meta, norm_weight_L=norm_L,
                                          eps=1e-6, interleaved=True),
            lambda: ops.latent_attention(q_TNX, up_NYL, caches, meta, scale=0.1))


def test_writing() -> None:
    write, _ = layer(32)
    first = ["clone", "npu_rms_norm", *CLONES, "npu_apply_rotary_pos_emb"]
    last = ["npu_scatter_pa_kv_cache", "cat"]
    assert launches(write) == [*ANGLES, *first, *SLOTS, *last]
    assert launches(write) == [*first, *last]


@pytest.mark.parametrize(("heads", "dense"), [(32, CLONES), (4, ["new_zeros", "copy"] * 2)], ids=["32", "4-of-32"])
def test_attention(heads: int, dense: list[str]) -> None:
    """What the products take and give in another order are views, but for the last."""
    _, attend = layer(heads)
    assert launches(attend) == ["bmm", *dense, "npu_fused_infer_attention_score_v2", "bmm", "clone"]
