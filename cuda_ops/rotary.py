"""Rotary embedding of the fused projection, with q/k norms and the cache write, in one kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cuda_ops.kv import block_stride, for_kernels, scale_bytes
from cuda_ops.kv_codes import encode, group_scale, size_bits
from cuda_ops.launch import config, launch, wait_for_previous


@triton.jit(do_not_specialize=["positions_ptr", "slots_ptr"])
def qkv_rope_write_kernel(
    qkv_ptr, positions_ptr, cos_sin_ptr, slots_ptr, q_norm_ptr, k_norm_ptr, q_ptr, k_cache_ptr, v_cache_ptr, eps,
    k_block, v_block, N, K, P, H: tl.constexpr, NORM_Q: tl.constexpr, NORM_K: tl.constexpr,
    SCALE_BYTES: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token, `HEADS` of its N + 2K heads: both halves of each at once, since they turn together."""
    wait_for_previous(PDL)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    i = tl.arange(0, HALF)[None, :]
    half = H // 2
    within = (i < half) & (head < N + 2 * K)
    is_q, is_v = head < N, head >= N + K
    is_k = (head >= N) & (head < N + K)
    heads_ptr = qkv_ptr + token * (N + 2 * K) * H + head * H + i
    raw_1 = tl.load(heads_ptr, within, 0.0)
    raw_2 = tl.load(heads_ptr + half, within, 0.0)
    x_1, x_2 = raw_1.to(tl.float32), raw_2.to(tl.float32)
    dtype = q_ptr.dtype.element_ty

    if NORM_Q or NORM_K:
        scale = tl.rsqrt((tl.sum(x_1 * x_1, 1) + tl.sum(x_2 * x_2, 1)) / H + eps)[:, None]
        y_1, y_2 = (x_1 * scale).to(dtype).to(tl.float32), (x_2 * scale).to(dtype).to(tl.float32)
        if NORM_Q:
            w_1, w_2 = tl.load(q_norm_ptr + i, i < half, 0.0), tl.load(q_norm_ptr + half + i, i < half, 0.0)
            x_1 = tl.where(is_q, (y_1 * w_1.to(tl.float32)).to(dtype).to(tl.float32), x_1)
            x_2 = tl.where(is_q, (y_2 * w_2.to(tl.float32)).to(dtype).to(tl.float32), x_2)
        if NORM_K:
            w_1, w_2 = tl.load(k_norm_ptr + i, i < half, 0.0), tl.load(k_norm_ptr + half + i, i < half, 0.0)
            x_1 = tl.where(is_k, (y_1 * w_1.to(tl.float32)).to(dtype).to(tl.float32), x_1)
            x_2 = tl.where(is_k, (y_2 * w_2.to(tl.float32)).to(dtype).to(tl.float32), x_2)

    angles_ptr = cos_sin_ptr + tl.load(positions_ptr + token).to(tl.int64) * H + i
    cos, sin = tl.load(angles_ptr, i < half, 0.0), tl.load(angles_ptr + half, i < half, 0.0)
    turned_1, turned_2 = x_1 * cos - x_2 * sin, x_2 * cos + x_1 * sin

    q_out = q_ptr + token * N * H + head * H + i
    tl.store(q_out, turned_1, within & is_q)
    tl.store(q_out + half, turned_2, within & is_q)

    slot = tl.load(slots_ptr + token)
    block, offset = (slot // P).to(tl.int64), slot % P
    if SCALE_BYTES:
        if (tl.program_id(1) + 1) * HEADS > N:
            # As the plain cache would have them.
            y_1 = tl.where(is_v, raw_1, turned_1.to(dtype)).to(tl.float32)
            y_2 = tl.where(is_v, raw_2, turned_2.to(dtype)).to(tl.float32)
            largest = tl.maximum(tl.max(size_bits(y_1), 1), tl.max(size_bits(y_2), 1))[:, None]
            kept, scale, usable = group_scale(largest, SCALE_BYTES == 1)
            codes_1 = encode(y_1, scale, usable, SCALE_BYTES == 1)
            codes_2 = encode(y_2, scale, usable, SCALE_BYTES == 1)
            k_tile = k_cache_ptr + block * k_block + (head - N) * P * (H + SCALE_BYTES)
            v_tile = v_cache_ptr + block * v_block + (head - N - K) * P * (H + SCALE_BYTES)
            k_scale, v_scale = k_tile + P * H + offset * SCALE_BYTES, v_tile + P * H + offset * SCALE_BYTES
            if SCALE_BYTES == 4:
                k_scale = k_scale.to(tl.pointer_type(tl.float32), bitcast=True)
                v_scale = v_scale.to(tl.pointer_type(tl.float32), bitcast=True)
            k_mask, v_mask = within & is_k & (slot >= 0), within & is_v & (slot >= 0)
            tl.store(k_tile + offset * H + i, codes_1, k_mask)
            tl.store(k_tile + offset * H + i + half, codes_2, k_mask)
            tl.store(v_tile + offset * H + i, codes_1, v_mask)
            tl.store(v_tile + offset * H + i + half, codes_2, v_mask)
            tl.store(k_scale, kept, is_k & (slot >= 0))
            tl.store(v_scale, kept, is_v & (head < N + 2 * K) & (slot >= 0))
    else:
        k_out = k_cache_ptr + block * k_block + ((head - N) * P + offset) * H + i
        k_mask = within & is_k & (slot >= 0)
        tl.store(k_out, turned_1, k_mask)
        tl.store(k_out + half, turned_2, k_mask)
        v_out = v_cache_ptr + block * v_block + ((head - N - K) * P + offset) * H + i
        v_mask = within & is_v & (slot >= 0)
        tl.store(v_out, raw_1, v_mask)
        tl.store(v_out + half, raw_2, v_mask)


def qkv_rope_write(
    qkv_TX: Tensor,
    positions_T: Tensor,
    cos_sin_LH: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping_T: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    q_norm_H: Tensor | None = None,
    k_norm_H: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    assert qkv_TX.is_contiguous() and cos_sin_LH.dtype is torch.float32
    num_tokens, P = len(qkv_TX), k_cache.shape[2]
    q_TNH = torch.empty(num_tokens, num_heads, head_dim, dtype=qkv_TX.dtype, device=qkv_TX.device)
    half = triton.next_power_of_2(head_dim // 2)
    numbers = config("qkv_rope_write", f"H{2 * half}", qkv_TX)
    grid = (num_tokens, triton.cdiv(num_heads + 2 * num_kv_heads, numbers["HEADS"]))
    launch(qkv_rope_write_kernel, grid, qkv_TX, positions_T, cos_sin_LH, slot_mapping_T, q_norm_H, k_norm_H, q_TNH,
           for_kernels(k_cache), for_kernels(v_cache), eps, block_stride(k_cache), block_stride(v_cache), num_heads,
           num_kv_heads, P, H=head_dim, NORM_Q=q_norm_H is not None, NORM_K=k_norm_H is not None,
           SCALE_BYTES=scale_bytes(k_cache), HALF=half, **numbers)  # fmt: skip
    return q_TNH
