"""`layout_of`: how this rank's KV blocks lie where they are stored, for other instances."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from torch import Tensor

from backends.backend import Backend
from xllm.kv_layout import FieldLayout, KVLayout, LayerRun
from xllm.runner.kv_codec import KVCodec


def layout_of(backend: Backend, layers: Sequence[tuple[Tensor, ...]], block_size: int, codec: KVCodec,
              all_heads: Sequence[int], *, rank: int, num_ranks: int) -> KVLayout:
    """layers: the cache. all_heads: by layer, how many kv heads the model has. rank: of `num_ranks` that share the
    model: each has an even run of the heads, or several have the same where there are fewer heads than ranks."""
    made = [_layer(backend, caches, codec.format, heads, rank, num_ranks)
            for caches, heads in zip(layers, all_heads, strict=True)]
    runs = tuple(LayerRun(num_layers=len(list(same)), layer_bytes=each[0], fields=each[1])
                 for each, same in groupby(made))
    return KVLayout(format=codec.name, block_size=block_size, runs=runs, rank=rank, num_ranks=num_ranks)


def _layer(backend: Backend, caches: tuple[Tensor, ...], format: str, all_heads: int, rank: int,
           num_ranks: int) -> tuple[int, tuple[FieldLayout, ...]]:
    """(bytes of the layer, its fields)."""
    fields = []
    for f in backend.stored_fields(caches, format=format):
        shares = all_heads // f.num_heads  # different runs of heads
        fields.append(FieldLayout(offset=f.offset, head_stride=f.head_stride, position_stride=f.position_stride,
                                  number_stride=f.number_stride, width=f.width, item_bytes=f.item_bytes,
                                  num_heads=f.num_heads, first_head=rank * shares // num_ranks * f.num_heads,
                                  total_heads=all_heads))
    return backend.ops.stored_bytes(caches, format=format), tuple(fields)
