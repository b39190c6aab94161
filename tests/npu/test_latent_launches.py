"""What a layer of latents queues on the device, by the operators' names: nothing that waits for it, and no arithmetic
on numbers that only the device's few CPU cores compute with (AICPU, milliseconds a call): int64 and float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from backends.npu import plan
from npu_ops import latent
from tests.npu.device import npu, randn
from tests.npu.launches import launches
from tests.npu.test_latent import D, L, R, V, step

ANGLES, SLOTS = ["index_select", "to_copy", "cat", "cat"], ["clamp"]  # once a step
CLONES = ["clone", "clone"]  # of views: the operator wants dense tensors


def layer(heads: int, query_lens: tuple[int, ...] = (1, 1), seq_lens: tuple[int, ...] = (30, 7),
          widths: tuple[int, int] = (D, V)) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Both operators of a layer, over two rows that decode, or others."""
    device, dtype, ops, T, (key_dim, value_dim) = npu().device, torch.bfloat16, npu().ops, sum(query_lens), widths
    meta = step(list(query_lens), list(seq_lens), 16)
    meta = replace(meta, block_table_SM=meta.block_table_SM.to(device), slot_mapping_T=meta.slot_mapping_T.to(device))
    meta.plan = plan(meta, num_heads=heads, num_kv_heads=1, head_dim=L + R)
    caches = [npu().allocate_kv_cache(shape, dtype) for shape in npu().latent_cache_shapes(16, 16, L, R, dtype)]
    latent_TX, q_TNX = randn(T, L + R, dtype=dtype), randn(T, heads, key_dim + R, dtype=dtype)
    up_NYL, norm_L = randn(heads, key_dim + value_dim, L, dtype=dtype), randn(L, dtype=dtype)
    cos_sin, positions_T = randn(50, R), torch.arange(T, dtype=torch.int32, device=device)
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


GATHER = ["index_select", "index_select"]  # latents, and what of them is rotated
MAKE = ["mm", "cat", "clone"]  # keys and values of some heads, each dense
COPY = ["is_pinned", "pin_memory", "to_copy"]  # of numbers of the host


def test_expanded_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their slots are found once a step. Heads are not filled up; where they are too many, queries are cut as well."""
    _, attend = layer(5, (40, 20), (40, 20), (128, 128))
    once, made = [*COPY, "index_select", "mul", "add"], [*MAKE, "npu_fused_infer_attention_score_v2"]
    assert launches(attend) == [*once, *GATHER, *made]
    assert launches(attend) == [*GATHER, *made]
    monkeypatch.setattr(latent, "MADE_BYTES", 40 * 3 * 640)
    _, attend = layer(5, (40,), (40,), (128, 128))
    parts = [*MAKE, "clone", "npu_fused_infer_attention_score_v2"] * 2
    assert launches(attend) == [*once, *GATHER, *parts, "cat"]


def test_a_step_of_both_forms() -> None:
    """Tokens are sorted by form, if they are not."""
    for lengths, order, back in (((40, 2), [], []), ((2, 40), ["index_select"], ["index_select"])):
        _, attend = layer(32, lengths, (40, 40), (128, 128))
        once = [*COPY, "index_select", "mul", "add", *COPY, "index_select", *(COPY if order else [])]
        made = [*GATHER, *MAKE, "npu_fused_infer_attention_score_v2"]
        absorbed = ["bmm", *CLONES, "npu_fused_infer_attention_score_v2", "bmm", "clone"]
        assert launches(attend) == [*once, *order, *made, *absorbed, "cat", *back]
        assert launches(attend) == [*order, *made, *absorbed, "cat", *back]
