"""The CPU backend: memory, defaults, and the table of the operators that the CPU has of its own."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from backends.backend import Capturer
from backends.cpu import latent, linear
from backends.cpu.build import load_kernels
from backends.cpu.expert_kernels import ExpertKernels
from backends.cpu.experts import SortedExperts
from backends.cpu.kernels import Kernels
from backends.cpu.memory import available_bytes, lazy_zeros, populate
from backends.cpu.threads import set_torch_threads
from backends.cpu.vmm import make_cpu_vmm
from backends.gated_experts import gated_by
from backends.latent_form import LatentWidths, expanded_bytes
from backends.opset import OpSet
from backends.reference import REFERENCE, stored_kv
from backends.reference.kv import cache_shape
from backends.reference.kv_codes import QUANTISED, row_width
from backends.reference.lora import LoraOps
from backends.stored_field import StoredField
from backends.vmm import VmmDriver

TORCH_LORA = LoraOps(linear.pack_linear, linear.linear)
TORCH_EXPERTS = SortedExperts(linear.pack_linear, linear.linear)
TORCH_OPS = replace(REFERENCE, name="cpu", pack_linear=linear.pack_linear, linear=linear.linear,
                    pack_lora=TORCH_LORA.pack_lora, lora_add=TORCH_LORA.lora_add,
                    pack_experts=TORCH_EXPERTS.pack_experts, grouped_linear=TORCH_EXPERTS.grouped_linear,
                    pack_gated_experts=TORCH_EXPERTS.pack_experts,
                    gated_grouped_linear=gated_by(TORCH_EXPERTS.grouped_linear, REFERENCE.silu_mul),
                    combine=TORCH_EXPERTS.combine, latent_attention=latent.latent_attention)


def compiled_ops(kernels: Kernels) -> OpSet:
    """What the CPU implements itself; `copy_blocks` is one indexed copy in torch already."""
    lora = LoraOps(kernels.pack_linear, kernels.linear)
    experts = ExpertKernels(kernels)
    return replace(
        REFERENCE,
        name="cpu",
        pack_linear=kernels.pack_linear,
        linear=kernels.linear,
        pack_lora=lora.pack_lora,
        lora_add=lora.lora_add,
        embedding=kernels.embedding,
        rms_norm=kernels.rms_norm,
        add_rms_norm=kernels.add_rms_norm,
        qkv_rope_write=kernels.qkv_rope_write,
        plan=kernels.plan,
        attention=kernels.attention,
        latent_rope_write=kernels.latent_rope_write,
        latent_attention=kernels.latent_attention,
        silu_mul=kernels.silu_mul,
        route=experts.route,
        pack_experts=experts.pack_experts,
        grouped_linear=experts.grouped_linear,
        pack_gated_experts=experts.pack_experts,
        gated_grouped_linear=gated_by(experts.grouped_linear, kernels.silu_mul),
        combine=experts.combine,
        export_blocks=kernels.export_blocks,
        import_blocks=kernels.import_blocks,
        apply_token_bitmask=kernels.apply_token_bitmask,
        penalise=kernels.penalise,
        argmax=kernels.argmax,
        sample=kernels.sample,
    )


class CpuBackend:
    """A `Backend`. cache_dir and compiled: see `backends.get_backend`."""

    name = "cpu"
    default_block_size = 16
    num_reserved_blocks = 0
    dense_kv = False
    max_cache_numbers: int | None = None
    collectives = "gloo"
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    kernel_dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    kv_dtypes: tuple[torch.dtype, ...] = tuple(QUANTISED)
    computes_on_host = True
    kv_memory_share = 0.5  # the memory is also everybody else's
    warm_up_seqs = 0
    strict_ops = False  # without a C compiler there is plain torch alone
    takes_scaled_weights = True
    quantization_advice = (
        "--quantization w8a8 made the bundled model 2.4 times as fast for one sequence and 2.0 times for eight; its "
        "products take a quarter of the memory, and it cost 0.02 % in bits per byte")

    def __init__(self, *, cache_dir: Path | None = None, compiled: bool = True):
        self.device = torch.device("cpu")
        self.vmm: VmmDriver | None = make_cpu_vmm()
        self.capturer: Capturer | None = None  # calls are cheap here
        library = load_kernels(cache_dir) if compiled else None
        self._kernels = None if library is None else Kernels(library)
        self.ops: OpSet = TORCH_OPS if self._kernels is None else compiled_ops(self._kernels)
        self.kernels = "plain torch" if library is None else "compiled for this processor"

    def set_num_threads(self, number: int, *, torch_number: int) -> None:
        if self._kernels is None:
            torch_number = number
        else:
            self._kernels.num_threads = number
        set_torch_threads(torch_number)

    def default_dtype(self, checkpoint_dtype: torch.dtype) -> torch.dtype:
        """Always float32: it is the dtype that CPUs multiply fast."""
        return torch.float32

    def kv_cache_shape(self, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int) -> tuple[int, ...]:
        return cache_shape(num_blocks, block_size, num_kv_heads, head_dim)

    def latent_cache_shapes(self, num_blocks: int, block_size: int, latent_width: int, rotated_width: int,
                            dtype: torch.dtype) -> tuple[tuple[int, ...], ...]:
        return (cache_shape(num_blocks, block_size, 1, row_width(latent_width + rotated_width, dtype)),)

    def expanded_bytes(self, widths: LatentWidths, *, num_positions: int, longest: int) -> int:
        return expanded_bytes(widths, num_positions=num_positions)

    def allocate_kv_cache(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return lazy_zeros(shape, dtype)

    def stored_fields(self, caches: Sequence[Tensor], *, format: str) -> list[StoredField]:
        return stored_kv.stored_fields(caches, format=format)

    def available_memory_bytes(self) -> int:
        return available_bytes()

    def allocate_host(self, num_bytes: int) -> Tensor:
        return lazy_zeros((num_bytes,), torch.uint8)

    def share_host(self, memory: np.ndarray) -> Tensor:
        return torch.from_numpy(memory)

    def populate_host(self, memory: Tensor) -> None:
        populate(memory)

    def available_host_bytes(self) -> int:
        return available_bytes()

    def synchronize_copies(self) -> None:
        """Copies on a CPU are done when they return."""

    def synchronize(self) -> None:
        """Nothing is queued on a CPU."""

    def release_memory(self) -> None:
        """Large tensors have pages of their own, which went back with them."""

    def describe(self) -> dict[str, str]:
        return {
            "device": f"cpu ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()})",
            "torch": torch.__version__,
            "threads": str(torch.get_num_threads()),
            "kernels": self.kernels,
            "inherited": ", ".join(self.ops.inherited_from(REFERENCE)) or "none",
        }
