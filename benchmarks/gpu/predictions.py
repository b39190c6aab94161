"""What is expected of a row before it is measured: the roofline, and the share of it that a good step reaches."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.roofline import SIXTEEN_BITS, Ceilings, Stored, Workload, decode_s, prefill_s, workload_s
from benchmarks.gpu.shapes import ModelShape

# Of the roofline's bandwidth or rate. A kernel in a captured graph costs NODE_US besides; a layer has NODES of them.
DECODE_SHARE, PREFILL_SHARE, WORKLOAD_SHARE = 0.88, 0.82, 0.78
NODE_US, NODES = 1.2, 10


def decode(shape: ModelShape, batch: int, context: int, ceilings: Ceilings,
           stored: Stored = SIXTEEN_BITS) -> dict[str, Any]:
    """Memory-bound kernels near their ceiling, and a gap for each of them."""
    floor_us = decode_s(shape, batch, context, ceilings, stored) * 1e6
    return _us(floor_us, floor_us / DECODE_SHARE + shape.layers * NODES * NODE_US,
               f"floor / {DECODE_SHARE} + {shape.layers} x {NODES} kernels x {NODE_US} us")


def prefill(shape: ModelShape, tokens: int, ceilings: Ceilings) -> dict[str, Any]:
    """Launched kernel by kernel: short prompts are bound by the host."""
    floor_us = prefill_s(shape, tokens, ceilings) * 1e6
    return _us(floor_us, max(floor_us / PREFILL_SHARE, shape.layers * NODES * 5.0),
               f"floor / {PREFILL_SHARE}, at least {shape.layers} x {NODES} launches x 5 us")


def workload(shape: ModelShape, work: Workload, ceilings: Ceilings) -> dict[str, Any]:
    floor_s = workload_s(shape, work, ceilings)
    return {"floor_us": floor_s * 1e6, "us": floor_s / WORKLOAD_SHARE * 1e6, "by": f"floor / {WORKLOAD_SHARE}",
            "tokens_per_s": work.num_output_tokens * WORKLOAD_SHARE / floor_s}  # fmt: skip


def _us(floor_us: float, us: float, by: str) -> dict[str, Any]:
    return {"floor_us": floor_us, "us": us, "by": by}
