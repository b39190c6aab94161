"""What a request does to its logits before a token is drawn, for all rows of a step at once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cuda_ops.launch import config, device_facts, launch

VARYING = ["rows_ptr", "ids_ptr", "starts_ptr", "output_starts_ptr", "repetition_ptr", "frequency_ptr", "presence_ptr",
           "X"]  # fmt: skip


@triton.jit(do_not_specialize=VARYING)
def penalise_kernel(
    logits_ptr, counts_ptr, rows_ptr, ids_ptr, starts_ptr, output_starts_ptr, repetition_ptr, frequency_ptr,
    presence_ptr, X, stride, V, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows program, program + num_programs, ...

    Compiled without fused multiply-adds, for the reference's bits. counts: a row of V numbers for the program, of which
    it reads what it has set: those of the history's tokens. Of equal tokens the one that takes the count out does the
    work.
    """
    lane = tl.arange(0, BLOCK)
    counts_ptr += tl.program_id(0).to(tl.int64) * V
    for x in tl.range(tl.program_id(0), X, tl.num_programs(0)):
        start, end = tl.load(starts_ptr + x), tl.load(starts_ptr + x + 1)
        for at in tl.range(start, end, BLOCK):
            inside = at + lane < end
            tl.store(counts_ptr + tl.load(ids_ptr + at + lane, inside, 0), 0, inside)
        tl.debug_barrier()
        for at in tl.range(tl.load(output_starts_ptr + x), end, BLOCK):
            inside = at + lane < end
            tl.atomic_add(counts_ptr + tl.load(ids_ptr + at + lane, inside, 0), 1, inside, sem="relaxed", scope="cta")
        tl.debug_barrier()
        repetition = tl.load(repetition_ptr + x)
        frequency, presence = tl.load(frequency_ptr + x), tl.load(presence_ptr + x)
        row_ptr = logits_ptr + tl.load(rows_ptr + x) * stride
        for at in tl.range(start, end, BLOCK):
            inside = at + lane < end
            ids = tl.load(ids_ptr + at + lane, inside, 0)
            count = tl.atomic_xchg(counts_ptr + ids, -1, inside, sem="relaxed", scope="cta")
            first = inside & (count >= 0)
            value = tl.load(row_ptr + ids, first, 0.0)
            if repetition != 1.0:
                divided = tl.div_rn(value, tl.full(value.shape, 0.0, tl.float32) + repetition)
                value = tl.where(value > 0, divided, value * repetition)
            penalty = (frequency * count.to(tl.float64) + presence).to(tl.float32)
            tl.store(row_ptr + ids, tl.where(count > 0, value - penalty, value), first)
        tl.debug_barrier()  # the counts are used again


def penalise(
    logits_SV: Tensor, rows_X: Tensor, token_ids_T: Tensor, starts_X1: Tensor, output_starts_X: Tensor,
    repetition_X: Tensor, frequency_X: Tensor, presence_X: Tensor,
) -> None:  # fmt: skip
    assert logits_SV.dtype is torch.float32 and logits_SV.stride(1) == 1
    X, V = len(rows_X), logits_SV.shape[1]
    num_programs = min(X, device_facts(logits_SV.device)[1])
    counts = torch.empty(num_programs, V, dtype=torch.int32, device=logits_SV.device)
    launch(penalise_kernel, (num_programs,), logits_SV, counts, rows_X, token_ids_T, starts_X1, output_starts_X,
           repetition_X, frequency_X, presence_X, X, logits_SV.stride(0), V,
           enable_fp_fusion=False, **config("penalise", "any", logits_SV))  # fmt: skip


@triton.jit(do_not_specialize=["bitmask_ptr", "rows_ptr"])
def token_bitmask_kernel(logits_ptr, bitmask_ptr, rows_ptr, stride, V, W, BLOCK: tl.constexpr):
    x = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    word = tl.load(bitmask_ptr + x * W + token // 32, token < W * 32, 0)
    forbidden = ((word >> (token % 32)) & 1) == 0
    at = logits_ptr + tl.load(rows_ptr + x) * stride + token
    tl.store(at, tl.full([BLOCK], float("-inf"), tl.float32), forbidden & (token < V))


def apply_token_bitmask(logits_SV: Tensor, bitmask_XW: Tensor, rows_X: Tensor) -> None:
    assert logits_SV.dtype is torch.float32 and logits_SV.stride(1) == 1 and bitmask_XW.is_contiguous()
    V, (X, W), numbers = logits_SV.shape[1], bitmask_XW.shape, config("token_bitmask", "any", logits_SV)
    launch(token_bitmask_kernel, (triton.cdiv(V, numbers["BLOCK"]), X), logits_SV, bitmask_XW, rows_X,
           logits_SV.stride(0), V, W, **numbers)  # fmt: skip
