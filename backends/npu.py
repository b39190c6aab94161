"""The Ascend backend: memory, streams, and the table of the operators that run through torch_npu.

All work of a step is queued on the device's default stream. Each thread that copies between device and host memory has
a stream of its own, which waits for what the default stream had queued when the copy was asked for. No thread touches
the device while another captures a graph (`npu_ops/recording.py:CAPTURE_LOCK`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from backends import npu_experts, npu_latent
from backends.backend import BackendError, Capturer
from backends.cpu.memory import available_bytes
from backends.latent_form import LatentWidths
from backends.metadata import AttentionMetadata
from backends.npu_graphs import NpuCapturer
from backends.npu_step import angles, block_table, derived, plan, step_plan
from backends.opset import OpSet
from backends.place import ALONE, Place
from backends.reference import REFERENCE
from backends.reference.linear import quantize_rows
from backends.reference.lora import LoraOps
from backends.scaled_weight import ScaledWeight
from backends.stored_field import StoredField, StoredPart, fields_of
from backends.streams import CopyStreams
from backends.vmm import VmmDriver
from npu_ops import activation, compat, kv, linear, logits, norm, rotary, sampling
from npu_ops import attention as attention_ops
from npu_ops.attention import causal_mask
from npu_ops.contract import set_checking
from npu_ops.kv import Dense
from npu_ops.recording import CAPTURE_LOCK
from npu_ops.vmm import AclVmm


def attention(
    q_TNH: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    meta: AttentionMetadata,
    *,
    scale: float,
    sliding_window: int | None = None,
) -> Tensor:
    step_plan(meta)
    key, value = Dense.of(k_cache), Dense.of(v_cache)
    table_SM = derived(meta, ("blocks", key.every), lambda: key.blocks(block_table(meta)))
    window = None if sliding_window is None or sliding_window >= meta.max_seq_len else sliding_window
    return attention_ops.paged_attention(
        query_TNH=q_TNH, key_BPX=key.rows_BPX, value_BPX=value.rows_BPX, block_table_SM=table_SM,
        lengths=lambda: meta.plan.lengths, num_kv_heads=k_cache.shape[2], scale=scale, sliding_window=window,
    ).flatten(1)  # fmt: skip


def qkv_rope_write(
    qkv_TX: Tensor,
    positions_T: Tensor,
    cos_sin_LH: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    meta: AttentionMetadata,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    q_norm_H: Tensor | None = None,
    k_norm_H: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    heads_TXH = qkv_TX.view(len(qkv_TX), num_heads + 2 * num_kv_heads, head_dim)
    parts = torch.split(heads_TXH, [num_heads, num_kv_heads, num_kv_heads], dim=1)
    q_TNH, k_TKH, v_TKH = (part.contiguous() for part in parts)
    if q_norm_H is not None:
        q_TNH = norm.rms_norm(x=q_TNH, gamma=q_norm_H, epsilon=eps)
    if k_norm_H is not None:
        k_TKH = norm.rms_norm(x=k_TKH, gamma=k_norm_H, epsilon=eps)
    cos, sin = angles(meta, cos_sin_LH, positions_T, q_TNH.dtype)
    key, value = Dense.of(k_cache), Dense.of(v_cache)
    # What is not to be written goes to block 0.
    slots_T = derived(meta, ("slots", key.every), lambda: key.slots(meta.slot_mapping_T.clamp(min=0)))
    kv.write_kv(key_TKH=rotary.rotary_mul(x_TNH=k_TKH, cos=cos, sin=sin), value_TKH=v_TKH, key=key, value=value,
                slots_T=slots_T)
    return rotary.rotary_mul(x_TNH=q_TNH, cos=cos, sin=sin)


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return norm.rms_norm(x=x_TD.contiguous(), gamma=weight_D, epsilon=eps)


def add_rms_norm(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return norm.add_rms_norm(x=x_TD.contiguous(), residual=residual_TD, gamma=weight_D, epsilon=eps)


def pack_linear(weight_YX: Tensor | ScaledWeight, bias_Y: Tensor | None = None, *,
                quantization: str | None = None) -> linear.PackedWeight | linear.W8A8Weight:
    if isinstance(weight_YX, ScaledWeight):
        raise ValueError("products on an NPU take no fp8")
    linear.check_quantization(quantization)
    if quantization is None:
        return linear.PackedWeight(weight_YX.contiguous(), bias_Y)
    codes_YX, scale_Y = quantize_rows(weight_YX, quantization)
    pack = linear.pack_w8a8 if quantization == "w8a8" else linear.pack_int8
    return pack(codes_YX=codes_YX, scale_Y=scale_Y, bias_Y=bias_Y, dtype=weight_YX.dtype)


LORA = LoraOps(pack_linear, linear.linear)
# `feed_tokens` is the reference's: three calls of torch.
OPS = replace(
    REFERENCE,
    name="npu",
    pack_linear=pack_linear,
    linear=linear.linear,
    pack_lora=LORA.pack_lora,
    lora_add=LORA.lora_add,
    embedding=linear.embedding,
    rms_norm=rms_norm,
    add_rms_norm=add_rms_norm,
    qkv_rope_write=qkv_rope_write,
    plan=plan,
    attention=attention,
    latent_rope_write=npu_latent.latent_rope_write,
    latent_attention=npu_latent.latent_attention,
    silu_mul=activation.silu_mul,
    route=npu_experts.route,
    pack_experts=npu_experts.pack_experts,
    grouped_linear=npu_experts.grouped_linear,
    pack_gated_experts=npu_experts.pack_gated_experts,
    gated_grouped_linear=npu_experts.gated_grouped_linear,
    combine=npu_experts.combine,
    copy_blocks=kv.copy_blocks,
    stored_bytes=kv.stored_bytes,
    export_blocks=kv.export_blocks,
    import_blocks=kv.import_blocks,
    apply_token_bitmask=logits.apply_token_bitmask,
    penalise=logits.penalise,
    argmax=sampling.argmax,
    sample=sampling.sample,
)


class NpuBackend:
    """A `Backend` over an NPU, `place`'s. Raises BackendError, with the reason, where it cannot run.

    check_contracts: check the arguments of every operator against its documentation (slow: it waits for the device).
    """

    name = "npu"
    default_block_size = 128
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16)  # attention takes no others
    kernel_dtypes = dtypes
    kv_dtypes: tuple[torch.dtype, ...] = ()
    dense_kv = True
    max_cache_numbers: int | None = kv.MAX_CACHE_NUMBERS
    collectives = "hccl"
    num_reserved_blocks = 1  # block 0, where padding is written
    computes_on_host = False
    kv_memory_share = 1.0
    warm_up_seqs = 16
    strict_ops = True
    takes_scaled_weights = False
    quantization_advice = ""

    def __init__(self, *, check_contracts: bool = False, place: Place = ALONE) -> None:
        open_torch_npu()
        set_checking(check_contracts)
        self.device = place.take("npu", torch.npu, "ASCEND_RT_VISIBLE_DEVICES")
        causal_mask(self.device)
        self.vmm: VmmDriver | None = make_vmm(self.device)
        self.capturer: Capturer | None = NpuCapturer(self.device)
        self._copies = CopyStreams(torch.npu, self.device, using=CAPTURE_LOCK.using)
        self.ops: OpSet = replace(OPS, export_blocks=self._copies.queued(kv.export_blocks),
                                  import_blocks=self._copies.queued(kv.import_blocks))  # fmt: skip

    def set_num_threads(self, number: int, *, torch_number: int) -> None:
        torch.set_num_threads(torch_number)

    def default_dtype(self, checkpoint_dtype: torch.dtype) -> torch.dtype:
        """bfloat16, or the checkpoint's where that is float16."""
        return torch.float16 if checkpoint_dtype is torch.float16 else torch.bfloat16

    def kv_cache_shape(self, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int) -> tuple[int, ...]:
        return kv.cache_shape(num_blocks, block_size, num_kv_heads, head_dim)

    def latent_cache_shapes(self, num_blocks: int, block_size: int, latent_width: int, rotated_width: int,
                            dtype: torch.dtype) -> tuple[tuple[int, ...], ...]:
        return kv.latent_cache_shapes(num_blocks, block_size, latent_width, rotated_width)

    def expanded_bytes(self, widths: LatentWidths, *, num_positions: int, longest: int) -> int:
        return npu_latent.expanded_bytes(widths, num_positions=num_positions, longest=longest)

    def allocate_kv_cache(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def stored_fields(self, caches: Sequence[Tensor], *, format: str) -> list[StoredField]:
        parts = [StoredPart(cache.shape[2], cache.shape[1], cache.shape[3], "PKH") for cache in caches]
        return fields_of(parts, format, is_quantised=False)

    def available_memory_bytes(self) -> int:
        """What the driver has free, and what torch keeps without using it."""
        free, _ = torch.npu.mem_get_info(self.device)
        return int(free + torch.npu.memory_reserved(self.device) - torch.npu.memory_allocated(self.device))

    def allocate_host(self, num_bytes: int) -> Tensor:
        with CAPTURE_LOCK.using():
            return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def share_host(self, memory: np.ndarray) -> Tensor:
        raise MemoryError("memory that other processes see is not pinned on this device yet")

    def populate_host(self, memory: Tensor) -> None:
        """Nothing to do: pinned memory is there from the start."""

    def available_host_bytes(self) -> int:
        return available_bytes()

    def synchronize_copies(self) -> None:
        self._copies.synchronize()

    def synchronize(self) -> None:
        with CAPTURE_LOCK.using():
            torch.npu.synchronize(self.device)

    def release_memory(self) -> None:
        torch.npu.synchronize(self.device)
        torch.npu.empty_cache()

    def describe(self) -> dict[str, str]:
        return {
            "device": f"{torch.npu.get_device_name(self.device)} "
                      f"({torch.npu.mem_get_info(self.device)[1] / 2**30:.0f} GiB)",
            "torch": f"{torch.__version__}, torch_npu {compat.installed_version()}",
            "kernels": "CANN, through torch_npu",
            "virtual memory": "yes" if self.vmm is not None else "no (the runtime lacks the calls)",
            "inherited": ", ".join(self.ops.inherited_from(REFERENCE)) or "none",
        }  # fmt: skip


def open_torch_npu() -> None:
    """Import torch_npu and look for a device. Raises BackendError with the reason."""
    try:
        compat.load()
    except compat.NpuMissing as error:
        raise BackendError(f"the npu backend: {error}") from error
    if not torch.npu.is_available():
        raise BackendError("the npu backend needs an Ascend NPU and its driver, and torch_npu sees none "
                           "(npu-smi info; in a container: /dev/davinci0 and the driver's lib64)")
    torch.npu.set_compile_mode(jit_compile=False)
    torch.npu.config.allow_internal_format = True


def make_vmm(device: torch.device) -> VmmDriver | None:
    try:
        return AclVmm(device.index)
    except RuntimeError:
        return None
