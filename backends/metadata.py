"""`AttentionMetadata`: where each sequence of a step lies, for the attention and KV-write ops.

Letters: T tokens in the step, S sequences, M blocks per sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor


@dataclass(frozen=True, slots=True)
class HostLengths:
    """Copies of two tensors of the metadata in host memory, int32: query_start_S1 and seq_lens_S. For op sets whose
    kernels take lengths as arguments, or that choose kernels by them; under graph mode they are refilled in place, as
    the tensors are."""

    query_start_S1: np.ndarray
    seq_lens_S: np.ndarray


@dataclass(slots=True, kw_only=True)
class AttentionMetadata:
    """Built fresh for each step; read-only for the ops. All tensors int32 on the device.

    Tokens of a sequence are adjacent and in order, so that token t of sequence s sits at row
    `query_start_S1[s] + i` and attends to the first `seq_lens_S[s] - query_len + i + 1` positions.

    query_start_S1: offsets into the T axis, with T at the end.
    seq_lens_S: KV length of each sequence *including* this step's tokens.
    block_table_SM: block ids; entries past a sequence's last block are undefined, never read.
    kv_base_S: if not None, the sequences lie contiguously: block m of sequence s is block `kv_base_S[s] + m` of the
    caches, and `block_table_SM` is empty, never read.
    slot_mapping_T: block_id * block_size + offset for each token; -1 means: do not write.
    host: the lengths on the host, or None: then only the tensors have them, as in a captured step where plans are
    captured with it (`Capturer.plans_in_graph`).
    max_query_len, max_seq_len: bounds; in graph mode they are those of the bucket.
    plan: whatever `OpSet.plan` computed once for the step; private to the op set.
    """

    query_start_S1: Tensor
    seq_lens_S: Tensor
    block_table_SM: Tensor
    slot_mapping_T: Tensor
    max_query_len: int
    max_seq_len: int
    num_tokens: int
    block_size: int
    kv_base_S: Tensor | None = None
    host: HostLengths | None = None
    plan: Any = None
