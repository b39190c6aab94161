"""What the layers of a step share on an Ascend NPU: its lengths on the host, and tensors that depend on the step
alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from backends.metadata import AttentionMetadata
from npu_ops import rotary
from npu_ops.attention import Lengths
from npu_ops.recording import current_recorder


@dataclass(slots=True)
class StepPlan:
    """The lengths of a step on the host, and tensors that its layers share; in a capture those are the recorder's."""

    lengths: Lengths
    derived: dict[Any, Any] = field(default_factory=dict)


def plan(meta: AttentionMetadata, *, num_heads: int, num_kv_heads: int, head_dim: int) -> StepPlan:
    """Reads the lengths from the host's copies; without them it waits for the device."""
    if meta.host is None:
        return StepPlan(Lengths(meta.query_start_S1[1:].tolist(), meta.seq_lens_S.tolist()))
    return StepPlan(Lengths(meta.host.query_start_S1[1:].tolist(), meta.host.seq_lens_S.tolist()))


def step_plan(meta: AttentionMetadata) -> StepPlan:
    """`meta.plan`, made if it is not there."""
    if meta.plan is None:
        meta.plan = plan(meta, num_heads=0, num_kv_heads=0, head_dim=0)
    found: StepPlan = meta.plan
    return found


def derived(meta: AttentionMetadata, key: Any, make: Callable[[], Any]) -> Any:
    """Tensors that depend on the step alone, made by the first layer that asks."""
    recorder = current_recorder()
    if recorder is not None:
        found = recorder.derived
    elif meta.plan is not None:
        found = meta.plan.derived
    else:
        return make()
    if key not in found:
        found[key] = make()
    return found[key]


def block_table(meta: AttentionMetadata) -> Tensor:
    """int32 [S, M]; for sequences that lie contiguously, with as many blocks as the longest may have."""
    if meta.kv_base_S is None:
        return meta.block_table_SM.contiguous()
    num_blocks = -(-meta.max_seq_len // meta.block_size)
    places_M = torch.arange(num_blocks, dtype=torch.int32, device=meta.kv_base_S.device)
    return meta.kv_base_S[:, None] + places_M


def angles(meta: AttentionMetadata, cos_sin_LH: Tensor, positions_T: Tensor,
           dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of the step's tokens; layers with another table have others."""
    cos, sin = derived(meta, ("angles", cos_sin_LH.data_ptr(), dtype),
                       lambda: rotary.angles(cos_sin_LH, positions_T, dtype))
    return cos, sin
