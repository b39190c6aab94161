"""`Backend`: the interface of a device. One process uses one backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from backends.latent_form import LatentWidths
from backends.opset import OpSet
from backends.stored_field import StoredField
from backends.vmm import VmmDriver


class BackendError(RuntimeError):
    """A backend is unknown, is not built, or lacks its device or libraries; the message says which."""


class GraphMemory(Protocol):
    """The tensors that a captured function reads and writes under fixed addresses (`graph/buffers.py`)."""

    @property
    def inputs(self) -> Mapping[str, Tensor]:
        """Refilled before each replay."""
        ...

    @property
    def outputs(self) -> Mapping[str, Tensor]:
        """Written by each replay."""
        ...


class CapturedGraph(Protocol):
    """Recorded work of the device. num_bytes: what the capture took from the pool. num_streams: what it holds."""

    num_bytes: int
    num_streams: int

    def replay(self) -> None:
        """Queue the work. Where kernels take lengths as arguments that were fixed by the capture, this also issues them
        again from `AttentionMetadata.plan` as it is now: the runner plans anew before it calls (`plans_in_graph`)."""
        ...

    def release(self) -> None:
        """Free what the graph holds. It must not be running, and must not be replayed again."""
        ...


class Capturer(Protocol):
    """A device's graph mode. Used by the runner's thread alone.

    plans_in_graph: `OpSet.plan` is part of the captured work (it runs on the device); else it is called before each
    replay, and what it reads on the host is `AttentionMetadata.host`.
    pad_slot: where padding tokens store their keys and values; -1: nowhere. pad_block: a block that padding rows may
    read; its contents do not matter.
    bucket_step: the distance of the buckets above 16.
    """

    plans_in_graph: bool
    pad_slot: int
    pad_block: int
    bucket_step: int

    @property
    def max_streams(self) -> int | None:
        """How many streams all graphs together may hold now; None: graphs need none."""
        ...

    def make_pool(self) -> Any:
        """Make a memory pool for what captured functions allocate. Graphs of one pool overwrite each other's memory, so
        they never run at the same time, and only `GraphMemory.outputs` outlive a replay."""
        ...

    def capture(self, function: Callable[[], None], *, pool: Any, memory: GraphMemory) -> CapturedGraph:
        """Record what `function` queues; whether it runs meanwhile is undefined, so running it twice must do no harm.

        The inputs hold a valid step. Raises RuntimeError or MemoryError if it cannot be recorded; the device is then as
        before.
        """
        ...

    def fence(self) -> Callable[[], None]:
        """Returns a function that blocks until everything that this thread has queued so far is done."""
        ...


@runtime_checkable
class Backend(Protocol):
    """A device: its operators, memory and layouts. See `backends/__init__.py:get_backend`.

    What the engine does on one device and not on another is asked here as a fact, never by the device's name:

    computes_on_host: operators run on the cores of this machine, in their caller's thread, so that copies between the
    KV tiers, torch's own threads and other processes compete with them.
    kv_memory_share: the part of the available memory that `gpu_memory_utilization` is a share of; below 1 where all
    processes of the machine live in that memory.
    warm_up_seqs: decode steps of up to so many sequences are captured, and kernels compiled, before the first request,
    unless `graph_warmup_seqs` says otherwise; 0: none.
    strict_ops: an engine does not start with a hot operator of the reference, unless `strict_ops` says otherwise.
    takes_scaled_weights: `OpSet.pack_linear` and `pack_experts` take matrices of fp8 with the scales of a checkpoint;
    where they do not, such a checkpoint is made plain while it is read.
    quantization_advice: what quantising a model gains on this device, measured, for who starts one; empty: not known.
    """

    name: str
    device: torch.device
    ops: OpSet
    default_block_size: int
    dtypes: tuple[torch.dtype, ...]  # that weights, activations and KV may have
    kernel_dtypes: tuple[torch.dtype, ...]  # of these, the ones that its own kernels compute in: others are slow
    kv_dtypes: tuple[torch.dtype, ...]  # that the KV cache may have beside the compute dtype: `reference/kv_codes.py`
    dense_kv: bool  # where blocks of a layer lie apart, they must do so by a multiple of their size
    max_cache_numbers: int | None  # of one tensor of a KV cache, as far as operators count; None: any
    collectives: str  # the backend of torch.distributed for its tensors: "gloo", "nccl", "hccl"
    num_reserved_blocks: int  # the first ones of the KV cache, which hold no tokens: the device's own use
    computes_on_host: bool
    kv_memory_share: float
    warm_up_seqs: int
    strict_ops: bool
    takes_scaled_weights: bool
    quantization_advice: str
    vmm: VmmDriver | None  # None: the device has no virtual memory management
    capturer: Capturer | None  # None: the device has no graph mode, or needs none

    def set_num_threads(self, number: int, *, torch_number: int) -> None:
        """Set how many CPU threads its own operators use from now on, and how many torch uses in the calling thread."""
        ...

    def default_dtype(self, checkpoint_dtype: torch.dtype) -> torch.dtype:
        """The compute dtype for `--dtype auto`."""
        ...

    def kv_cache_shape(self, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int) -> tuple[int, ...]:
        """Shape of one part of one layer's cache: its keys, its values, or a latent; the first axis is the block.

        Raises ValueError for sizes that the device's operators do not take.
        """
        ...

    def latent_cache_shapes(self, num_blocks: int, block_size: int, latent_width: int, rotated_width: int,
                            dtype: torch.dtype) -> tuple[tuple[int, ...], ...]:
        """Shapes of the parts of one layer's cache of latents: one part of both widths, or two, where operators want
        the rotated numbers apart. With room for the scales of a quantised cache. Raises ValueError as
        `kv_cache_shape`."""
        ...

    def expanded_bytes(self, widths: LatentWidths, *, num_positions: int, longest: int) -> int:
        """Bytes that attention over latents takes at most where it makes keys and values of them, for a step whose
        sequences have so many positions together, and one of them `longest` at most."""
        ...

    def allocate_kv_cache(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Allocate one cache tensor. Memory may be taken only when it is touched; contents start undefined but
        finite."""
        ...

    def stored_fields(self, caches: Sequence[Tensor], *, format: str) -> list[StoredField]:
        """How one layer lies in the stored form of `OpSet.export_blocks`, in this format. caches: the layer's parts."""
        ...

    def available_memory_bytes(self) -> int:
        """Bytes that a KV cache could take now, before any safety margin."""
        ...

    def allocate_host(self, num_bytes: int) -> Tensor:
        """Allocate host memory that the device copies to and from at full speed (pinned where that matters): uint8
        [num_bytes]. Memory may be taken only when it is touched; contents undefined."""
        ...

    def share_host(self, memory: np.ndarray) -> Tensor:
        """A tensor over host memory that other processes see too, as good for copies as what `allocate_host` gives:
        uint8, of all its bytes. memory: uint8, on pages of its own. Raises MemoryError where the device cannot use
        it."""
        ...

    def populate_host(self, memory: Tensor) -> None:
        """Have the system provide the memory of such a tensor now rather than at its first use. Contents stay as they
        are."""
        ...

    def available_host_bytes(self) -> int:
        """Bytes of host memory that `allocate_host` could take now."""
        ...

    def synchronize_copies(self) -> None:
        """Wait for the copies between device and host memory that this thread has queued."""
        ...

    def synchronize(self) -> None:
        """Wait for all queued work of this process on the device."""
        ...

    def release_memory(self) -> None:
        """Return device memory that no tensor uses to the device, for other processes."""
        ...

    def describe(self) -> dict[str, str]:
        """Facts for `xllm doctor` and the log: device, libraries, which kernels are in use."""
        ...
