"""`LatentAttention`: multi-head latent attention (MLA; DeepSeek-V2, 2024). What is kept of a token is one latent, and a
rotated part of its keys that all heads share.

Letters: T tokens, N query heads, L width of a latent, R of the rotated part, D of the rest of a key, V of a value.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from backends.metadata import AttentionMetadata
from xllm.layers.layer_context import LayerContext, Weights
from xllm.layers.linear import column_linear, row_linear
from xllm.layers.norm import RMSNorm
from xllm.parallel.shard import Shard, share_heads

NORM_EPS = 1e-6  # of both norms within, whatever the config says of the others: as transformers and DeepSeek have it
WHOLE = Shard(0, 0, 1)


@dataclass(frozen=True, kw_only=True)
class LatentShape:
    """The attention of one layer, all ranks together.

    q_rank: width of what queries are made of; None: of the hidden state. latent_width, rotated_dim, key_dim, value_dim:
    L, R, D, V. bias: of the projections down and of the output. interleaved: see `ops.latent_rope_write`.
    """

    hidden_size: int
    num_heads: int
    q_rank: int | None
    latent_width: int
    rotated_dim: int
    key_dim: int
    value_dim: int
    bias: bool
    interleaved: bool
    scale: float


class LatentAttention:
    """Causal attention of one layer over latents. Writes this step's before it reads them all.

    Ranks share the heads; the latents and what makes them are whole on each. The matrix that makes keys and values of
    latents keeps the compute dtype, and takes no adapters.
    """

    __slots__ = ("_attention", "_cos_sin_XR", "_down", "_kv_norm_L", "_num_heads", "_o", "_q_norm", "_q_up",
                 "_rope_write", "_shape", "_up_NYL")

    def __init__(self, context: LayerContext, weights: Weights, name: str, shape: LatentShape, cos_sin_XR: Tensor):
        group, size = context.parallel.tp, shape.hidden_size
        heads = share_heads(shape.num_heads, 1, rank=group.rank, size=group.size)
        q_width = shape.num_heads * (shape.key_dim + shape.rotated_dim)
        down = {f"{name}.kv_a_proj_with_mqa": (shape.latent_width + shape.rotated_dim, WHOLE)}
        self._q_norm = None
        if shape.q_rank is None:
            self._q_up = column_linear(context, weights, {f"{name}.q_proj": (q_width, heads.query)}, size)
        else:
            down = {f"{name}.q_a_proj": (shape.q_rank, WHOLE), **down}
            self._q_norm = RMSNorm(context, weights, f"{name}.q_a_layernorm", shape.q_rank, NORM_EPS)
            self._q_up = column_linear(context, weights, {f"{name}.q_b_proj": (q_width, heads.query)}, shape.q_rank)
        self._down = column_linear(context, weights, down, size, bias=shape.bias)
        self._kv_norm_L = weights.take(f"{name}.kv_a_layernorm.weight", (shape.latent_width,))
        made = shape.key_dim + shape.value_dim
        up_YL = weights.take(f"{name}.kv_b_proj.weight", (shape.num_heads * made, shape.latent_width), heads.query)
        self._up_NYL = up_YL.view(heads.num_heads, made, shape.latent_width)
        self._o = row_linear(context, weights, f"{name}.o_proj", size, shape.num_heads * shape.value_dim,
                             bias=shape.bias)
        self._num_heads, self._shape, self._cos_sin_XR = heads.num_heads, shape, cos_sin_XR
        self._rope_write, self._attention = context.ops.latent_rope_write, context.ops.latent_attention

    def __call__(self, x_TD: Tensor, positions_T: Tensor, caches: tuple[Tensor, ...],
                 meta: AttentionMetadata) -> Tensor:
        """caches: this layer's latents, in one part, or two where the device lays the rotated numbers apart."""
        cache, shape = caches[0] if len(caches) == 1 else caches, self._shape
        latent_TX = self._down(x_TD)
        if shape.q_rank is None:
            q_TX = self._q_up(x_TD)
        else:
            assert self._q_norm is not None
            low_TX, latent_TX = latent_TX[:, :shape.q_rank], latent_TX[:, shape.q_rank:]
            q_TX = self._q_up(self._q_norm(low_TX))
        q_TNX = self._rope_write(
            latent_TX, q_TX.view(len(x_TD), self._num_heads, -1), positions_T, self._cos_sin_XR, cache, meta,
            norm_weight_L=self._kv_norm_L, eps=NORM_EPS, interleaved=shape.interleaved)
        return self._o(self._attention(q_TNX, self._up_NYL, cache, meta, scale=shape.scale))
