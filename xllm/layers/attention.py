"""`Attention`: fused projection, rotation into the KV cache, attention over it, output projection."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from backends.metadata import AttentionMetadata
from xllm.layers.context import LayerContext
from xllm.layers.linear import load_linear


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """What distinguishes the attention of one layer; `qk_norm_eps` None: q and k are not normed."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool
    o_bias: bool
    qk_norm_eps: float | None
    sliding_window: int | None


class Attention:
    """Causal attention of one layer. Writes this step's keys and values before it reads them all."""

    __slots__ = ("_attention", "_cos_sin_LH", "_k_norm_H", "_o", "_q_norm_H", "_qk_eps", "_qkv", "_qkv_rope_write",
                 "_scale", "_shape", "nbytes")

    def __init__(self, context: LayerContext, name: str, shape: AttentionShape, cos_sin_LH: Tensor):
        q_size, kv_size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        qkv = {f"{name}.q_proj": q_size, f"{name}.k_proj": kv_size, f"{name}.v_proj": kv_size}
        self._qkv = load_linear(context, qkv, shape.hidden_size, bias=shape.qkv_bias)
        self._o = load_linear(context, {f"{name}.o_proj": shape.hidden_size}, q_size, bias=shape.o_bias)
        self._q_norm_H = self._k_norm_H = None
        if shape.qk_norm_eps is not None:
            self._q_norm_H = context.weights.take(f"{name}.q_norm.weight", (shape.head_dim,))
            self._k_norm_H = context.weights.take(f"{name}.k_norm.weight", (shape.head_dim,))
        self._qk_eps = shape.qk_norm_eps or 0.0
        self._cos_sin_LH = cos_sin_LH
        self._shape = shape
        self._scale = shape.head_dim**-0.5
        self._qkv_rope_write = context.ops.qkv_rope_write
        self._attention = context.ops.attention
        norms = [norm for norm in (self._q_norm_H, self._k_norm_H) if norm is not None]
        self.nbytes = self._qkv.nbytes + self._o.nbytes + sum(norm.nbytes for norm in norms)

    def __call__(self, x_TD: Tensor, positions_T: Tensor, k_cache: Tensor, v_cache: Tensor,
                 meta: AttentionMetadata) -> Tensor:
        shape = self._shape
        q_TNH = self._qkv_rope_write(
            self._qkv(x_TD), positions_T, self._cos_sin_LH, k_cache, v_cache, meta,
            num_heads=shape.num_heads, num_kv_heads=shape.num_kv_heads, head_dim=shape.head_dim,
            q_norm_H=self._q_norm_H, k_norm_H=self._k_norm_H, eps=self._qk_eps,
        )
        out_TX = self._attention(q_TNH, k_cache, v_cache, meta, scale=self._scale, sliding_window=shape.sliding_window)
        return self._o(out_TX)
