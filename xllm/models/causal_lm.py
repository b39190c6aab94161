"""`CausalLM`: the interface of every model in memory; the runner uses nothing else of it.

Letters: T tokens in the step, S rows that want logits, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from backends.metadata import AttentionMetadata
from xllm.models.kv_spec import KVSpec
from xllm.models.model_config import ModelConfig

KVCaches = Iterable[tuple[Tensor, ...]]  # of each layer in order, its parts as its `KVSpec` says


class CausalLM(Protocol):
    """What the runner calls, inside `torch.inference_mode`.

    generates: whether there is a head; without, embeddings can be had, and `compute_logits` means nothing.
    kv_specs: what this rank's blocks hold, by layer. dtype: of the hidden states.
    """

    config: ModelConfig
    dtype: torch.dtype
    generates: bool
    kv_specs: tuple[KVSpec, ...]

    def plan(self, meta: AttentionMetadata) -> object:
        """What the layers want computed once a step; the caller puts it into `meta.plan`. Graphs may capture it."""
        ...

    def forward(self, input_ids_T: Tensor, positions_T: Tensor, kv_caches: KVCaches, meta: AttentionMetadata) -> Tensor:
        """hidden_TD after the final norm. Writes what the step adds to `kv_caches`.

        positions_T: int32, below the `max_model_len` that the model was loaded with.
        `meta.plan` is filled already.
        """
        ...

    def compute_logits(self, hidden_SD: Tensor) -> Tensor:
        """logits_SV in fp32, of the rows that the caller picked from `forward`'s result."""
        ...
