"""Mixtures of experts over a dense decoder's attention: what Mixtral, Qwen2-MoE and Qwen3-MoE share."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from xllm.models.dense import DenseConfig, build_with
from xllm.models.model_config import ModelConfig
from xllm.models.raw_config import RawConfig
from xllm.parallel.shard import Shard

if TYPE_CHECKING:
    from xllm.layers.layer_context import LayerContext, Weights
    from xllm.models.causal_lm import CausalLM
    from xllm.models.decoder import FeedForward

# Chosen, far beyond any model: a config's number alone must not make millions of experts.
MAX_EXPERTS = 2**16


@dataclass(frozen=True, kw_only=True)
class MixtureConfig(DenseConfig):
    """expert_layers: by layer, whether its mlp is a mixture; the others have a gated mlp of `ffn_size`.

    num_chosen: experts of a token. expert_ffn_size: width of each of them. shared_ffn_size: of the one beside them that
    every token has, with a gate of its own; 0: there is none. renormalise: a token's weights sum up to one.
    """

    expert_layers: tuple[bool, ...]
    num_experts: int
    num_chosen: int
    expert_ffn_size: int
    shared_ffn_size: int = 0
    renormalise: bool = False

    @property
    def experts_a_token(self) -> int:
        return self.num_chosen if any(self.expert_layers) else 0

    @property
    def special_ops(self) -> frozenset[str]:
        return frozenset({"route", "grouped_linear", "combine"} if self.experts_a_token else ())

    def check_shared(self, num_ranks: int) -> None:
        super().check_shared(num_ranks)
        Shard(0, 0, num_ranks).even_width(self.expert_ffn_size, "the width of an expert")
        Shard(0, 0, num_ranks).even_width(self.shared_ffn_size, "the width of the shared expert")


def read_mixture(
    raw: RawConfig,
    dense: DenseConfig,
    *,
    num_experts: int,
    expert_layers: tuple[bool, ...],
    expert_ffn_size: int,
    renormalise: bool,
    shared_ffn_size: int = 0,
) -> MixtureConfig:
    """The keywords are what the family decides; num_experts: where the file says none. Raises ModelError."""
    num_experts, num_chosen = _number_of_experts(raw, num_experts), raw.integer("num_experts_per_tok", high=MAX_EXPERTS)
    if num_chosen > num_experts:
        raise raw.error(f"num_experts_per_tok ({num_chosen}) is more than there are experts ({num_experts})")
    return MixtureConfig(
        **{field.name: getattr(dense, field.name) for field in fields(dense)}, expert_layers=expert_layers,
        num_experts=num_experts, num_chosen=num_chosen, expert_ffn_size=expert_ffn_size,
        shared_ffn_size=shared_ffn_size, renormalise=renormalise)


def _number_of_experts(raw: RawConfig, default: int) -> int:
    """transformers 5 may write `num_local_experts` for what the Qwen families called `num_experts`."""
    names = [name for name in ("num_local_experts", "num_experts") if raw.values.get(name) is not None]
    found = {raw.integer(name, high=MAX_EXPERTS) for name in names}
    if len(found) > 1:
        raise raw.error(f"num_local_experts and num_experts differ ({' and '.join(map(str, sorted(found)))})")
    return found.pop() if found else default


def every_nth_layer(raw: RawConfig, num_layers: int) -> tuple[bool, ...]:
    """`expert_layers` by the Qwen rule: layer i unless it is in `mlp_only_layers`, if i + 1 is a multiple of
    `decoder_sparse_step`."""
    step, plain = raw.integer("decoder_sparse_step"), raw.values.get("mlp_only_layers") or []
    if not isinstance(plain, list) or any(isinstance(i, bool) or not isinstance(i, int) for i in plain):
        raise raw.error(f"mlp_only_layers must be a list of layer numbers, got {plain!r}")
    return tuple(i not in plain and (i + 1) % step == 0 for i in range(num_layers))


def build(context: LayerContext, config: ModelConfig, weights: Weights) -> CausalLM:
    """`Family.build` of the Qwen families."""
    return build_mixture(context, config, weights, block="mlp", parts=("gate_proj", "up_proj", "down_proj"))


def build_mixture(context: LayerContext, config: ModelConfig, weights: Weights, *, block: str,
                  parts: tuple[str, str, str]) -> CausalLM:
    """block, parts: what a checkpoint whose experts stand apart calls the mixture, and an expert's gate, up and down.
    Where they are stacked, all checkpoints have the names of transformers 5."""
    from backends.expert_choice import RouteRule
    from xllm.layers.experts import Experts, ExpertShape, SharedExpert
    from xllm.layers.mlp import GatedMLP

    assert isinstance(config, MixtureConfig)
    shape = ExpertShape(
        hidden_size=config.hidden_size, ffn_size=config.expert_ffn_size, num_experts=config.num_experts,
        rule=RouteRule(num_chosen=config.num_chosen, renormalise=config.renormalise), parts=parts)

    def mlp(index: int, name: str) -> FeedForward:
        if not config.expert_layers[index]:
            return GatedMLP(context, weights, name, config.hidden_size, config.ffn_size, bias=config.mlp_bias)
        apart = f"{name.removesuffix('mlp')}{block}"
        name = name if weights.has(f"{name}.gate.weight") else apart
        shared = None
        if config.shared_ffn_size:
            shared = SharedExpert(context, weights, f"{name}.shared_expert", config.hidden_size, config.shared_ffn_size,
                                  gate=f"{name}.shared_expert_gate")
        return Experts(context, weights, name, shape, shared)

    return build_with(context, config, weights, mlp)
