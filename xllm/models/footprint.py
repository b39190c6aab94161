"""`Footprint`: the memory that a model takes beside its KV cache, computed from the headers of its files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from xllm.models.fp8_format import SCALE_SUFFIX, Fp8Format
from xllm.models.stored_tensor import FP8
from xllm.models.weights import checkpoint_files

MAX_HEAD_BYTES = 10**8  # the safetensors library's own limit
TABLE, HEAD, EXPERTS = "embed_tokens.weight", "lm_head.weight", ".experts."
NOT_PRODUCTS = (TABLE, "kv_b_proj.weight")  # matrices that keep the compute dtype, whatever the quantisation
# Full fp32 copies of the largest matrix while it is packed: as it was read, and its absolute values and its codes
# before they are rounded (`quantize_rows`).
COPIES, QUANTISED_COPIES = 1, 3
# What a layer holds of each token at once: gate, up and their product; residual, normed, q, k, v and the result.
WIDE_ROWS, HIDDEN_ROWS = 3, 6
# And of each row of its experts, with vectors of the hidden size as they lie by expert and by token.
EXPERT_HIDDEN_ROWS = 2
LOGIT_COPIES = 2  # fp32: as computed, and as the sampler edits them


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes. weights: as the layers keep them. loading: besides, while the largest of them is packed. steps: of the
    longest step's activations and logits."""

    weights: int
    loading: int = 0
    steps: int = 0


class StoredShape(NamedTuple):
    """Of a tensor. is_fp8: as a checkpoint of fp8 brings matrices."""

    shape: tuple[int, ...]
    is_fp8: bool = False


def weight_shapes(folder: Path) -> dict[str, StoredShape]:
    """Of all tensors of a checkpoint but the scales of others. Files are not mapped, which the system refuses for those
    larger than its memory. What is broken is left out here, and refused when it is read. Raises ModelError where there
    is nothing to read."""
    found: dict[str, StoredShape] = {}
    for file in checkpoint_files(folder):
        found.update(_shapes_in(file))
    return {name: stored for name, stored in found.items() if not name.endswith(SCALE_SUFFIX)}


def _shapes_in(file: Path) -> dict[str, StoredShape]:
    """A safetensors file begins with the length of its head in 8 bytes, and the head, a JSON object."""
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            head = json.loads(opened.read(length)) if length <= MAX_HEAD_BYTES else {}
        return {name: StoredShape(tuple(int(size) for size in entry["shape"]), entry["dtype"] == FP8)
                for name, entry in head.items() if name != "__metadata__"}
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return {}


def footprint(stored: Mapping[str, StoredShape], dtype: torch.dtype, quantization: str | None, *, num_tokens: int,
              num_rows: int, num_shares: int = 1, expert_rows: int = 0, attention_bytes: int = 0,
              kept: Fp8Format | None = None) -> Footprint:
    """Of a checkpoint with tensors of these shapes, on one of the `num_shares` ranks that share its matrices.

    quantization: brings products to one byte a number, and one fp32 scale a row. num_tokens: of the longest step.
    num_rows: of it that want logits. expert_rows: how many rows experts compute at a time. attention_bytes: see
    `ModelConfig`. kept: the form of products that stay fp8; None: none do. A head that the checkpoint does not bring is
    a second copy of the table, in its own layout.
    """
    weights = largest = widest = widest_expert = 0
    tables = {name: each for name, each in stored.items() if name.endswith(TABLE) and len(each.shape) == 2}
    heads = {} if any(name.endswith(HEAD) for name in stored) else {f"{name} as head": e for name, e in tables.items()}
    for name, (shape, is_fp8) in (*stored.items(), *heads.items()):
        is_matrix = len(shape) in (2, 3)  # three: experts, of which ranks read their shares one after the other
        numbers = -(-math.prod(shape) // num_shares) if is_matrix else math.prod(shape)
        is_product = is_matrix and not name.endswith(NOT_PRODUCTS)
        if is_product and kept and is_fp8 and not name.endswith(HEAD):
            weights += numbers + 4 * -(-math.prod(shape[:-1]) * -(-shape[-1] // kept.columns) // num_shares)
        else:
            num_scales = math.prod(shape[:-1])
            weights += numbers + 4 * num_scales if is_product and quantization else numbers * dtype.itemsize
        largest = max(largest, numbers // shape[0] if len(shape) == 3 else numbers)
        if EXPERTS in name and is_product:
            widest_expert = max(widest_expert, -(-shape[-2] // num_shares))
        elif is_product and name not in heads and not name.endswith(HEAD):
            widest = max(widest, -(-shape[0] // num_shares))
    vocab_size, hidden_size = next(iter(tables.values()), StoredShape((0, 0))).shape
    numbers = (num_tokens * (WIDE_ROWS * widest + HIDDEN_ROWS * hidden_size)
               + expert_rows * (WIDE_ROWS * widest_expert + EXPERT_HIDDEN_ROWS * hidden_size))
    return Footprint(weights, 4 * largest * (QUANTISED_COPIES if quantization else COPIES),
                     numbers * dtype.itemsize + attention_bytes
                     + LOGIT_COPIES * 4 * min(num_rows, num_tokens) * vocab_size)
