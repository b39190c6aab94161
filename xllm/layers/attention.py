"""`Attention`: fused projection, rotation into the KV cache, attention over it, output projection."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from backends.metadata import AttentionMetadata
from xllm.layers.adapter_slots import in_order
from xllm.layers.layer_context import LayerContext, Weights
from xllm.layers.linear import column_linear, row_linear
from xllm.layers.rotary import paired_order
from xllm.parallel.shard import share_heads

AttentionPlan = Callable[[AttentionMetadata], object]  # what goes into `AttentionMetadata.plan`


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """What distinguishes the attention of one layer, all ranks together; `qk_norm_eps` None: q and k are not normed.
    rotated_dim: how many of a head's numbers are rotated, from the first on; None: all."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool
    o_bias: bool
    qk_norm_eps: float | None
    sliding_window: int | None
    rotated_dim: int | None = None


class Attention:
    """Causal attention of one layer over keys and values. Writes this step's before it reads them all.

    Ranks share the heads, as `share_heads` says.
    """

    __slots__ = ("_attention", "_cos_sin_LH", "_head_dim", "_heads", "_k_norm_H", "_o", "_q_norm_H", "_qk_eps", "_qkv",
                 "_qkv_rope_write", "_scale", "_window")

    def __init__(self, context: LayerContext, weights: Weights, name: str, shape: AttentionShape, cos_sin_LH: Tensor):
        group, head_dim = context.parallel.tp, shape.head_dim
        heads = share_heads(shape.num_heads, shape.num_kv_heads, rank=group.rank, size=group.size)
        keys_or_values = shape.num_kv_heads * head_dim, heads.kv
        qkv = {f"{name}.q_proj": (shape.num_heads * head_dim, heads.query), f"{name}.k_proj": keys_or_values,
               f"{name}.v_proj": keys_or_values}
        order_H = paired_order(head_dim, shape.rotated_dim or head_dim)
        self._qkv = column_linear(context, weights, qkv, shape.hidden_size, bias=shape.qkv_bias,
                                  orders={f"{name}.q_proj": order_H, f"{name}.k_proj": order_H})
        self._o = row_linear(context, weights, f"{name}.o_proj", shape.hidden_size, shape.num_heads * head_dim,
                             bias=shape.o_bias)
        self._q_norm_H = self._k_norm_H = None
        if shape.qk_norm_eps is not None:
            self._q_norm_H = in_order(weights.take(f"{name}.q_norm.weight", (head_dim,)), order_H)
            self._k_norm_H = in_order(weights.take(f"{name}.k_norm.weight", (head_dim,)), order_H)
        self._qk_eps = shape.qk_norm_eps or 0.0
        self._cos_sin_LH = cos_sin_LH
        self._heads, self._head_dim, self._window = heads, head_dim, shape.sliding_window
        self._scale = head_dim**-0.5
        self._qkv_rope_write = context.ops.qkv_rope_write
        self._attention = context.ops.attention

    def __call__(self, x_TD: Tensor, positions_T: Tensor, caches: tuple[Tensor, ...],
                 meta: AttentionMetadata) -> Tensor:
        """caches: this layer's keys and values. `meta.plan` is of `attention_plan`'s making."""
        (k_cache, v_cache), heads = caches, self._heads
        q_TNH = self._qkv_rope_write(
            self._qkv(x_TD), positions_T, self._cos_sin_LH, k_cache, v_cache, meta,
            num_heads=heads.num_heads, num_kv_heads=heads.num_kv_heads, head_dim=self._head_dim,
            q_norm_H=self._q_norm_H, k_norm_H=self._k_norm_H, eps=self._qk_eps,
        )
        out_TX = self._attention(q_TNH, k_cache, v_cache, meta, scale=self._scale, sliding_window=self._window)
        return self._o(out_TX)


def attention_plan(context: LayerContext, num_heads: int, num_kv_heads: int, head_dim: int) -> AttentionPlan:
    """Computes what layers of so many heads, all ranks together, want to have once a step."""
    group = context.parallel.tp
    heads = share_heads(num_heads, num_kv_heads, rank=group.rank, size=group.size)
    return partial(context.ops.plan, num_heads=heads.num_heads, num_kv_heads=heads.num_kv_heads, head_dim=head_dim)
