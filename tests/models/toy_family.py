"""A family that is nothing like the dense ones, as a file of its own: what a mixture of experts or MLA would add.

Even layers keep one latent a position, and their mlp picks one of several experts. Odd layers keep keys and values, of
other heads and widths in each layer, and have the usual gated mlp. Tests register it under `ARCHITECTURE`.

Letters: T tokens in the step, N query heads, R width of the latent, D hidden, E experts, F ffn.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from backends.metadata import AttentionMetadata
from xllm.models.kv_spec import KVSpec
from xllm.models.model_config import DecoderConfig, ModelConfig, read_common
from xllm.models.raw_config import RawConfig

if TYPE_CHECKING:
    from xllm.layers.attention import Attention, AttentionPlan
    from xllm.layers.layer_context import LayerContext, Weights
    from xllm.models.causal_lm import CausalLM
    from xllm.models.decoder import AttentionBlock, FeedForward

ARCHITECTURE = "ToyForCausalLM"
DEFAULTS = {"rms_norm_eps": 1e-6, "latent_width": 24, "num_experts": 3}


@dataclass(frozen=True, kw_only=True)
class ToyConfig(DecoderConfig):
    num_heads: int
    ffn_size: int
    latent_width: int
    num_experts: int

    @property
    def kv_specs(self) -> tuple[KVSpec, ...]:
        return tuple(self._latent() if index % 2 == 0 else self._pair(index) for index in range(self.num_layers))

    def _latent(self) -> KVSpec:
        return KVSpec(num_heads=1, widths=(self.latent_width,))

    def _pair(self, index: int) -> KVSpec:
        heads, width = self.pair_shape(index)
        return KVSpec(num_heads=heads, widths=(width, width))

    def pair_shape(self, index: int) -> tuple[int, int]:
        """kv heads and head dim of an odd layer: 2 and 16 in layer 1, 1 and 24 in layer 3, and so on."""
        return (2, 16) if index % 4 == 1 else (1, 24)


def read_config(raw: RawConfig, architecture: str) -> ToyConfig:
    return ToyConfig(
        **read_common(raw, architecture), num_heads=raw.integer("num_attention_heads"),
        ffn_size=raw.integer("intermediate_size"), latent_width=raw.integer("latent_width"),
        num_experts=raw.integer("num_experts"))


def build(context: LayerContext, config: ModelConfig, weights: Weights) -> CausalLM:
    from xllm.layers.attention import attention_plan
    from xllm.layers.mlp import GatedMLP
    from xllm.models.decoder import Decoder

    assert isinstance(config, ToyConfig)
    plans: dict[int, AttentionPlan] = {
        index: attention_plan(context, config.num_heads, *config.pair_shape(index))
        for index in range(1, config.num_layers, 2)}

    def attention(index: int, name: str) -> AttentionBlock:
        if index % 2 == 0:
            return LatentAttention(context, config, weights, name)
        return PlannedApart(index, _pair_attention(context, config, weights, index, name))

    def mlp(index: int, name: str) -> FeedForward:
        if index % 2 == 0:
            return Experts(config, weights, name)
        return GatedMLP(context, weights, name, config.hidden_size, config.ffn_size, bias=False)

    return Decoder(context, config, weights, attention=attention, mlp=mlp,
                   plan=lambda meta: {index: plan(meta) for index, plan in plans.items()})


def _pair_attention(context: LayerContext, config: ToyConfig, weights: Weights, index: int, name: str) -> Attention:
    from xllm.layers.attention import Attention, AttentionShape
    from xllm.layers.rotary import rope_table

    num_kv_heads, head_dim = config.pair_shape(index)
    shape = AttentionShape(
        hidden_size=config.hidden_size, num_heads=config.num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim,
        qkv_bias=False, o_bias=False, qk_norm_eps=None, sliding_window=None)
    return Attention(context, weights, name, shape,
                     rope_table(config.rope, head_dim, context.max_model_len, context.device))


class PlannedApart:
    """Attention that finds its plan under its layer's number: the layers differ."""

    def __init__(self, index: int, attention: Attention):
        self._index, self._attention = index, attention

    def __call__(self, x_TD: Tensor, positions_T: Tensor, caches: tuple[Tensor, ...],
                 meta: AttentionMetadata) -> Tensor:
        return self._attention(x_TD, positions_T, caches, replace(meta, plan=meta.plan[self._index]))


class LatentAttention:
    """Queries of N heads over one latent a position, which is key and value in one. On the CPU's layout of a cache."""

    def __init__(self, context: LayerContext, config: ToyConfig, weights: Weights, name: str):
        from xllm.layers.linear import column_linear, row_linear

        size, self._num_heads, self._width = config.hidden_size, config.num_heads, config.latent_width
        inner = self._num_heads * self._width
        self._q = column_linear(context, weights, {f"{name}.q_proj": (inner, context.parallel.tp_shard(0))}, size)
        self._down_RD = weights.take(f"{name}.kv_down.weight", (self._width, size))
        self._o = row_linear(context, weights, f"{name}.o_proj", size, inner)

    def __call__(self, x_TD: Tensor, positions_T: Tensor, caches: tuple[Tensor, ...],
                 meta: AttentionMetadata) -> Tensor:
        (cache,) = caches  # [B, 1, P, R]
        written_T, slots_T = meta.slot_mapping_T >= 0, meta.slot_mapping_T.long()
        blocks_T, places_T = slots_T[written_T] // meta.block_size, slots_T[written_T] % meta.block_size
        cache[blocks_T, 0, places_T] = (x_TD @ self._down_RD.T)[written_T]
        q_TNR = self._q(x_TD).view(len(x_TD), self._num_heads, self._width)
        starts, lengths = meta.query_start_S1.tolist(), meta.seq_lens_S.tolist()
        out = [attend(q_TNR[starts[s]:starts[s + 1]], self._latents(cache, meta, s, length))
               for s, length in enumerate(lengths)]
        return self._o(torch.cat(out).flatten(1))

    def _latents(self, cache: Tensor, meta: AttentionMetadata, s: int, length: int) -> Tensor:
        num_blocks = -(-length // meta.block_size)
        if meta.kv_base_S is not None:
            first = int(meta.kv_base_S[s])
            return cache[first:first + num_blocks, 0].flatten(0, 1)[:length]
        return cache[meta.block_table_SM[s, :num_blocks].long(), 0].flatten(0, 1)[:length]


def attend(q_QNR: Tensor, latents_CR: Tensor) -> Tensor:
    """Causal attention of the last Q positions of one sequence: [Q, N, R]."""
    num_queries, length = len(q_QNR), len(latents_CR)
    scores_NQC = torch.einsum("qnr,cr->nqc", q_QNR, latents_CR) * q_QNR.shape[-1] ** -0.5
    hidden_QC = torch.ones(num_queries, length).triu(length - num_queries + 1).bool()
    return torch.einsum("nqc,cr->qnr", scores_NQC.masked_fill(hidden_QC, -torch.inf).softmax(-1), latents_CR)


class Experts:
    """relu(up_e x)^2 through down_e, with the expert e that a router likes most."""

    def __init__(self, config: ToyConfig, weights: Weights, name: str):
        size, ffn, experts = config.hidden_size, config.ffn_size, range(config.num_experts)
        self._router_ED = weights.take(f"{name}.router.weight", (config.num_experts, size))
        self._up_EFD = torch.stack([weights.take(f"{name}.experts.{e}.up.weight", (ffn, size)) for e in experts])
        self._down_EDF = torch.stack([weights.take(f"{name}.experts.{e}.down.weight", (size, ffn)) for e in experts])

    def __call__(self, x_TD: Tensor) -> Tensor:
        expert_T = (x_TD @ self._router_ED.T).argmax(-1)
        inner_TF = torch.einsum("tfd,td->tf", self._up_EFD[expert_T], x_TD).relu().square()
        return torch.einsum("tdf,tf->td", self._down_EDF[expert_T], inner_TF)
