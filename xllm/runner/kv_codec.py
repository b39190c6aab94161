"""`KVCodec`: how a KV block of all layers is laid out in the host and disk tiers, and in which number format."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from backends.opset import OpSet
from backends.reference.kv_codes import QUANTISED

# By `--kv-store-dtype`, and by the dtype of a cache for "auto".
FORMATS = {
    "fp32": "fp32", "float32": "fp32", "float": "fp32", "bf16": "bf16", "bfloat16": "bf16",
    "fp16": "fp16", "float16": "fp16", "half": "fp16", "int8": "int8", "fp8": "fp8", "fp8_e4m3": "fp8",
}  # fmt: skip
DTYPE_FORMATS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", **QUANTISED}
VERSION = 1  # of the stored bytes, part of `name`: blocks that another version stored on disk are not found


class KVCodec:
    """A stored block ("payload") is the stored parts of its layers, one after the other, without gaps.

    payload_bytes: of one block, all layers. name: the format and its version, for a fingerprint.
    Its methods mutate nothing here; several threads may call them.
    """

    def __init__(self, format: str, cache_dtype: torch.dtype, layer_bytes: Sequence[int]):
        """format: one of `FORMATS`' values. layer_bytes: from `OpSet.stored_bytes`, by layer."""
        self.format, self.cache_dtype = format, cache_dtype
        self.name = f"{format}.{VERSION}"
        ends = torch.tensor(layer_bytes, dtype=torch.int64).cumsum(0).tolist()
        self._ranges = list(zip([0, *ends[:-1]], ends))
        self.payload_bytes: int = ends[-1]

    @classmethod
    def for_cache(cls, kv_store_dtype: str, layers: Sequence[tuple[Tensor, ...]], ops: OpSet) -> KVCodec:
        """The codec that `--kv-store-dtype` names, for a cache of these layers; "auto": as the cache itself."""
        dtype = layers[0][0].dtype
        format = DTYPE_FORMATS[dtype] if kv_store_dtype == "auto" else FORMATS[kv_store_dtype]
        return cls(format, dtype, [ops.stored_bytes(caches, format=format) for caches in layers])

    def export_layer(self, ops: OpSet, caches: tuple[Tensor, ...], block_ids_B: Tensor, host_SX: Tensor,
                     slots_B: Tensor, layer: int) -> None:
        """Copy one layer of device blocks into payloads. caches: the layer's parts. host_SX: uint8 [any, payload_bytes]
        in host memory, written at slots_B; ids: int64."""
        first, end = self._ranges[layer]
        ops.export_blocks(caches, block_ids_B, host_SX[:, first:end], slots_B, format=self.format)

    def import_layer(self, ops: OpSet, caches: tuple[Tensor, ...], block_ids_B: Tensor, host_SX: Tensor,
                     slots_B: Tensor, layer: int) -> None:
        """Copy one layer of payloads into device blocks; the reverse of `export_layer`."""
        first, end = self._ranges[layer]
        ops.import_blocks(caches, block_ids_B, host_SX[:, first:end], slots_B, format=self.format)
