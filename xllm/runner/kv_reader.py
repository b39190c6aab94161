"""`KVReader`: reads KV blocks of the device for other instances, a layer at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from backends.backend import Backend
from xllm.kv_layout import KVLayout


class KVReader:
    """Reads layers of this rank's blocks in the number format of whoever they are sent to."""

    def __init__(self, backend: Backend, layers: Sequence[tuple[Tensor, ...]], layout: KVLayout):
        self._backend, self._layers, self.layout = backend, layers, layout
        self.num_layers = len(layers)

    @torch.inference_mode()
    def read(self, block_ids: np.ndarray, layer: int, format: str) -> np.ndarray:
        """uint8 [n, stored bytes of the layer]; waits until they are in host memory."""
        ops, caches = self._backend.ops, self._layers[layer]
        stored = torch.empty(len(block_ids), ops.stored_bytes(caches, format=format), dtype=torch.uint8)
        ops.export_blocks(caches, torch.from_numpy(block_ids.astype(np.int64)), stored,
                          torch.arange(len(block_ids)), format=format)
        self._backend.synchronize_copies()
        return stored.numpy()
