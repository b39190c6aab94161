"""The CUDA backend: memory, streams, and the table of the operators that run as Triton kernels.

All work of a step is queued on the device's default stream. Each thread that copies between device and host memory has
a stream of its own, which waits for what the default stream had queued when the copy was asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

from backends import cuda_experts, cuda_latent, cuda_linear
from backends.backend import BackendError, Capturer
from backends.cpu.memory import available_bytes
from backends.cuda_graphs import CudaCapturer
from backends.gated_experts import gated_by
from backends.latent_form import LatentWidths, expanded_bytes
from backends.metadata import AttentionMetadata
from backends.opset import OpSet
from backends.pinned_memory import PinnedMemory
from backends.place import ALONE, Place
from backends.reference import REFERENCE
from backends.reference.kv_codes import QUANTISED, row_width
from backends.stored_field import StoredField, StoredPart, fields_of
from backends.streams import CopyStreams
from backends.vmm import VmmDriver
from cuda_ops import activation, feed, kv, latent_rope, linear, logits, lora, norm, rotary, sampling
from cuda_ops import attention as attention_kernels
from cuda_ops.vmm import CudaVmm

LEAST_CAPABILITY = (8, 0)  # ampere: the kernels need bfloat16 and asynchronous copies to shared memory
# Pinned allocations up to this size come from torch's pool, larger ones are made singly. Chosen: the pool rounds up to
# a power of two and keeps what is dropped, which wastes little where allocations are small.
POOLED_BYTES = 1 << 20


def plan(meta: AttentionMetadata, *, num_heads: int, num_kv_heads: int, head_dim: int) -> Any:
    """Plans by sliding window, each made by the first layer that has it; part of the captured work in a graph."""
    return {}


def attention(
    q_TNH: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    meta: AttentionMetadata,
    *,
    scale: float,
    sliding_window: int | None = None,
) -> Tensor:
    batch = _batch(meta)
    window = None if sliding_window is None or sliding_window >= meta.max_seq_len else sliding_window
    plans = {} if meta.plan is None else meta.plan
    if window not in plans:
        shape = attention_kernels.Shape.of(q_TNH, k_cache)
        plans[window] = attention_kernels.plan(batch, shape, q_TNH, window)
    return attention_kernels.attention(q_TNH, k_cache, v_cache, batch, plans[window], scale=scale).flatten(1)


def _batch(meta: AttentionMetadata) -> attention_kernels.Batch:
    return attention_kernels.Batch(
        query_start_S1=meta.query_start_S1, seq_lens_S=meta.seq_lens_S, block_table_SM=meta.block_table_SM,
        kv_base_S=meta.kv_base_S, num_tokens=meta.num_tokens, max_query_len=meta.max_query_len,
    )  # fmt: skip


def latent_attention(q_TNX: Tensor, up_NYL: Tensor, cache: Tensor, meta: AttentionMetadata, *, scale: float) -> Tensor:
    return cuda_latent.attention(q_TNX, up_NYL, cache, meta, _batch(meta), scale=scale)


def latent_rope_write(
    latent_TX: Tensor,
    q_TNX: Tensor,
    positions_T: Tensor,
    cos_sin_XR: Tensor,
    cache: Tensor,
    meta: AttentionMetadata,
    **options: Any,
) -> Tensor:
    return latent_rope.latent_rope_write(latent_TX, q_TNX, positions_T, cos_sin_XR, cache, meta.slot_mapping_T,
                                         **options)


def qkv_rope_write(
    qkv_TX: Tensor,
    positions_T: Tensor,
    cos_sin_LH: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    meta: AttentionMetadata,
    **options: Any,
) -> Tensor:
    return rotary.qkv_rope_write(qkv_TX, positions_T, cos_sin_LH, k_cache, v_cache, meta.slot_mapping_T, **options)


OPS = replace(
    REFERENCE,
    name="cuda",
    pack_linear=cuda_linear.pack_linear,
    linear=cuda_linear.linear,
    pack_lora=lora.pack_lora,
    lora_add=lora.lora_add,
    embedding=linear.embedding,
    feed_tokens=feed.feed_tokens,
    rms_norm=norm.rms_norm,
    add_rms_norm=norm.add_rms_norm,
    qkv_rope_write=qkv_rope_write,
    plan=plan,
    attention=attention,
    latent_rope_write=latent_rope_write,
    latent_attention=latent_attention,
    silu_mul=activation.silu_mul,
    route=cuda_experts.route,
    pack_experts=cuda_experts.pack_experts,
    grouped_linear=cuda_experts.grouped_linear,
    pack_gated_experts=cuda_experts.pack_experts,
    gated_grouped_linear=gated_by(cuda_experts.grouped_linear, activation.silu_mul),
    combine=cuda_experts.combine,
    copy_blocks=kv.copy_blocks,
    stored_bytes=kv.stored_bytes,
    export_blocks=kv.export_blocks,
    import_blocks=kv.import_blocks,
    apply_token_bitmask=logits.apply_token_bitmask,
    penalise=logits.penalise,
    argmax=sampling.argmax,
    sample=sampling.sample,
)


class CudaBackend:
    """A `Backend` over a CUDA device, `place`'s. Raises BackendError, with the reason, where it cannot run."""

    name = "cuda"
    default_block_size = 128
    num_reserved_blocks = 0
    dense_kv = False
    max_cache_numbers: int | None = None
    collectives = "nccl"
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    kernel_dtypes = dtypes
    kv_dtypes: tuple[torch.dtype, ...] = tuple(QUANTISED)
    computes_on_host = False
    kv_memory_share = 1.0
    warm_up_seqs = 16
    strict_ops = True
    takes_scaled_weights = True
    quantization_advice = ""

    def __init__(self, place: Place = ALONE) -> None:
        check_torch()
        self.device = place.take("cuda", torch.cuda, "CUDA_VISIBLE_DEVICES")
        check_device(self.device)
        self.vmm: VmmDriver | None = make_vmm(self.device)
        self.capturer: Capturer | None = CudaCapturer(self.device)
        self._copies = CopyStreams(torch.cuda, self.device)
        self._pinned = PinnedMemory(CudaPinning(self.device))
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
        return (kv.cache_shape(num_blocks, block_size, 1, row_width(latent_width + rotated_width, dtype)),)

    def expanded_bytes(self, widths: LatentWidths, *, num_positions: int, longest: int) -> int:
        return expanded_bytes(widths, num_positions=num_positions)

    def allocate_kv_cache(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def stored_fields(self, caches: Sequence[Tensor], *, format: str) -> list[StoredField]:
        own = QUANTISED.get(caches[0].dtype)
        parts = [StoredPart(cache.shape[1], cache.shape[2], cache.shape[3] - kv.scale_bytes(cache), "KPH")
                 for cache in caches]
        return fields_of(parts, own or format, is_quantised=own is not None)

    def available_memory_bytes(self) -> int:
        """What the driver has free, and what torch keeps without using it."""
        free, _ = torch.cuda.mem_get_info(self.device)
        return free + torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)

    def allocate_host(self, num_bytes: int) -> Tensor:
        """Allocate pinned memory. Large allocations do not come from torch's own pool, which would round them up to a
        power of two and keep them when they are dropped."""
        if num_bytes <= POOLED_BYTES:
            return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        return self._pinned.allocate(num_bytes)

    def share_host(self, memory: np.ndarray) -> Tensor:
        raise MemoryError("memory that other processes see is not pinned on this device yet")

    def populate_host(self, memory: Tensor) -> None:
        """Nothing to do: pinned memory is there from the start."""

    def available_host_bytes(self) -> int:
        return available_bytes()

    def synchronize_copies(self) -> None:
        self._copies.synchronize()

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def release_memory(self) -> None:
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()

    def describe(self) -> dict[str, str]:
        properties = torch.cuda.get_device_properties(self.device)
        return {
            "device": f"{properties.name} (sm_{properties.major}{properties.minor}, {properties.multi_processor_count} "
                      f"multiprocessors, {properties.total_memory / 2**30:.0f} GiB)",
            "torch": f"{torch.__version__}, CUDA {torch.version.cuda}",
            "kernels": f"triton {triton.__version__}",
            "virtual memory": "yes" if self.vmm is not None else "no (cuda-bindings missing or not supported)",
            "inherited": ", ".join(self.ops.inherited_from(REFERENCE)) or "none",
        }  # fmt: skip


class CudaPinning:
    """A `PinningDriver`: the CUDA runtime."""

    def __init__(self, device: torch.device):
        self._device = device

    def register(self, address: int, num_bytes: int) -> int:
        return int(torch.cuda.cudart().cudaHostRegister(address, num_bytes, 0))

    def unregister(self, address: int) -> int:
        return int(torch.cuda.cudart().cudaHostUnregister(address))

    def is_capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._device)


def check_torch() -> None:
    """Raise BackendError unless torch has a CUDA device."""
    if torch.version.cuda is None:
        raise BackendError(f"the cuda backend needs a CUDA build of torch; this is {torch.__version__}")
    if not torch.cuda.is_available():
        raise BackendError("the cuda backend needs a CUDA device and its driver, and torch sees none")


def check_device(device: torch.device) -> None:
    """Raise BackendError unless the kernels are made for such a device."""
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        raise BackendError("the cuda backend needs compute capability 8.0 (Ampere) or newer; "
                           f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}")  # fmt: skip


def make_vmm(device: torch.device) -> VmmDriver | None:
    try:
        return CudaVmm(device.index)
    except RuntimeError:
        return None
