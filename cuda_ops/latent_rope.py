"""What latent attention does before it attends: norm of the latent, rotation, and the cache write, in one kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cuda_ops.kv import block_stride, for_kernels, scale_bytes
from cuda_ops.kv_codes import encode, group_scale, size_bits
from cuda_ops.launch import config, launch, wait_for_previous


@triton.jit(do_not_specialize=["positions_ptr", "slots_ptr"])
def latent_rope_write_kernel(
    latent_ptr, q_ptr, positions_ptr, cos_sin_ptr, slots_ptr, norm_ptr, cache_ptr, eps, latent_token, q_token, q_head,
    block, N, P, D, L: tl.constexpr, R: tl.constexpr, PAD_L: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr,
    SCALE_BYTES: tl.constexpr, HEADS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token: program 0 its latent, with the rotated part, into the cache; the others `HEADS` of its queries."""
    wait_for_previous(PDL)
    token = tl.program_id(0).to(tl.int64)
    dtype = q_ptr.dtype.element_ty
    i = tl.arange(0, HALF)[None, :]
    half: tl.constexpr = R // 2
    angles_ptr = cos_sin_ptr + tl.load(positions_ptr + token).to(tl.int64) * R + i
    cos, sin = tl.load(angles_ptr, i < half, 0.0), tl.load(angles_ptr + half, i < half, 0.0)
    if PAIRS:
        first, second = 2 * i, 2 * i + 1
    else:
        first, second = i, i + half
    if tl.program_id(1) == 0:
        column = tl.arange(0, PAD_L)[None, :]
        source = latent_ptr + token * latent_token
        x = tl.load(source + column, column < L, 0.0).to(tl.float32)
        x_1 = tl.load(source + L + first, i < half, 0.0).to(tl.float32)
        x_2 = tl.load(source + L + second, i < half, 0.0).to(tl.float32)
        y = (x * tl.rsqrt(tl.sum(x * x, 1) / L + eps)[:, None]).to(dtype).to(tl.float32)
        y = (y * tl.load(norm_ptr + column, column < L, 0.0).to(tl.float32)).to(dtype)
        y_1, y_2 = (x_1 * cos - x_2 * sin).to(dtype), (x_2 * cos + x_1 * sin).to(dtype)
        slot = tl.load(slots_ptr + token)
        offset = slot % P
        target = cache_ptr + (slot // P).to(tl.int64) * block
        mask, turned_mask = (column < L) & (slot >= 0), (i < half) & (slot >= 0)
        row = target + offset * (L + R)
        if SCALE_BYTES:
            y, y_1, y_2 = y.to(tl.float32), y_1.to(tl.float32), y_2.to(tl.float32)
            largest = tl.maximum(tl.max(size_bits(y_1), 1), tl.max(size_bits(y_2), 1))
            largest = tl.maximum(tl.max(size_bits(y), 1), largest)[:, None]
            kept, scale, usable = group_scale(largest, SCALE_BYTES == 1)
            tl.store(row + column, encode(y, scale, usable, SCALE_BYTES == 1), mask)
            tl.store(row + L + i, encode(y_1, scale, usable, SCALE_BYTES == 1), turned_mask)
            tl.store(row + L + half + i, encode(y_2, scale, usable, SCALE_BYTES == 1), turned_mask)
            scale_ptr = target + P * (L + R) + offset * SCALE_BYTES
            if SCALE_BYTES == 4:
                scale_ptr = scale_ptr.to(tl.pointer_type(tl.float32), bitcast=True)
            none = tl.zeros([1, 1], tl.int32)
            tl.store(scale_ptr + none, kept, (none == 0) & (slot >= 0))
        else:
            tl.store(row + column, y, mask)
            tl.store(row + L + i, y_1, turned_mask)
            tl.store(row + L + half + i, y_2, turned_mask)
    else:
        head = (tl.program_id(1) - 1) * HEADS + tl.arange(0, HEADS)[:, None]
        within = (i < half) & (head < N)
        turned = q_ptr + token * q_token + head * q_head + D
        q_1 = tl.load(turned + first, within, 0.0).to(tl.float32)
        q_2 = tl.load(turned + second, within, 0.0).to(tl.float32)
        tl.debug_barrier()  # pairs stand elsewhere when they come back: all are read before any is written
        tl.store(turned + i, q_1 * cos - q_2 * sin, within)
        tl.store(turned + half + i, q_2 * cos + q_1 * sin, within)


def latent_rope_write(
    latent_TX: Tensor,
    q_TNX: Tensor,
    positions_T: Tensor,
    cos_sin_XR: Tensor,
    cache: Tensor,
    slot_mapping_T: Tensor,
    *,
    norm_weight_L: Tensor,
    eps: float,
    interleaved: bool,
) -> Tensor:
    """q_TNX itself, rotated in place."""
    assert latent_TX.stride(1) == q_TNX.stride(2) == 1 and cos_sin_XR.dtype is torch.float32
    (T, N, X), L, R = q_TNX.shape, len(norm_weight_L), cos_sin_XR.shape[1]
    numbers = config("latent_rope_write", "any", q_TNX)
    launch(latent_rope_write_kernel, (T, 1 + triton.cdiv(N, numbers["HEADS"])), latent_TX, q_TNX, positions_T,
           cos_sin_XR, slot_mapping_T, norm_weight_L, for_kernels(cache), eps, latent_TX.stride(0), q_TNX.stride(0),
           q_TNX.stride(1), block_stride(cache), N, cache.shape[2], X - R, L=L, R=R,
           PAD_L=triton.next_power_of_2(L), HALF=triton.next_power_of_2(R // 2), PAIRS=interleaved,
           SCALE_BYTES=scale_bytes(cache), **numbers)  # fmt: skip
    return q_TNX
