"""Mixtral: Mistral with eight experts in every layer, of which each token has two."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xllm.models.dense import read_dense
from xllm.models.mixture import Mixture, MixtureConfig, build_mixture, read_number_of_experts, with_mixture
from xllm.models.model_config import MAX_LAYERS, ModelConfig
from xllm.models.raw_config import RawConfig

if TYPE_CHECKING:
    from xllm.layers.layer_context import LayerContext, Weights
    from xllm.models.causal_lm import CausalLM

DEFAULTS = {
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "rope_theta": 1e6,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "num_experts_per_tok": 2,
}


def read_config(raw: RawConfig, architecture: str) -> MixtureConfig:
    """`intermediate_size` is the width of an expert. The window is every layer's."""
    num_layers = raw.integer("num_hidden_layers", high=MAX_LAYERS)
    dense = read_dense(raw, architecture, sliding_windows=(raw.optional_integer("sliding_window"),) * num_layers)
    num_experts, num_chosen = read_number_of_experts(raw, 8)
    return with_mixture(dense, Mixture(
        layers=(True,) * num_layers, num_experts=num_experts, num_chosen=num_chosen, expert_size=dense.ffn_size,
        renormalise=True))


def build(context: LayerContext, config: ModelConfig, weights: Weights) -> CausalLM:
    return build_mixture(context, config, weights, block="block_sparse_moe", parts=("w1", "w3", "w2"))
