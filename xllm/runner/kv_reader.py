"""`KVReader`: reads KV blocks of the device for other instances, a layer at a time, in the number format of theirs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from backends.backend import Backend
from backends.reference.kv_codes import QUANTISED
from xllm.errors import TransferError
from xllm.kv_layout import KVLayout
from xllm.runner.kv_codec import DTYPE_FORMATS, KVCodec
from xllm.runner.stored_layout import layout_of


class KVReader:
    """layers: the cache. all_heads: by layer, the kv heads of the model. rank: of `num_ranks` that share it. Its
    methods change nothing; several threads may call them."""

    def __init__(self, backend: Backend, layers: Sequence[tuple[Tensor, ...]], block_size: int,
                 all_heads: Sequence[int], *, rank: int, num_ranks: int):
        self._backend, self._layers, self._block_size, self._all_heads = backend, layers, block_size, all_heads
        self._rank, self._num_ranks = rank, num_ranks
        self.num_layers = len(layers)

    def layout(self, codec: KVCodec) -> KVLayout:
        """How its blocks lie in the stored form of this codec."""
        return layout_of(self._backend, self._layers, self._block_size, codec, self._all_heads, rank=self._rank,
                         num_ranks=self._num_ranks)

    def layout_like(self, other: KVLayout) -> KVLayout:
        """The same in the number format of another layout. Raises TransferError if this cache cannot be read so."""
        name, cache = other.format.partition(".")[0], self._layers[0][0]
        if cache.dtype in QUANTISED and name != QUANTISED[cache.dtype]:
            raise TransferError(f"a KV cache of {QUANTISED[cache.dtype]} is sent as that, and {name} is wanted")
        if name not in DTYPE_FORMATS.values():
            raise TransferError(f"KV is stored there in a format that nobody knows here: {other.format}")
        return self.layout(KVCodec.for_cache(name, self._layers, self._backend.ops))

    @torch.inference_mode()
    def read(self, block_ids: np.ndarray, layer: int, layout: KVLayout) -> np.ndarray:
        """uint8 [n, stored bytes of the layer] in the number format of `layout`; waits until they are in host
        memory."""
        ops, caches, format = self._backend.ops, self._layers[layer], layout.format.partition(".")[0]
        stored = torch.empty(len(block_ids), ops.stored_bytes(caches, format=format), dtype=torch.uint8)
        ops.export_blocks(caches, torch.from_numpy(block_ids.astype(np.int64)), stored,
                          torch.arange(len(block_ids)), format=format)
        self._backend.synchronize_copies()
        return stored.numpy()
