"""`Mixture`: the experts of a decoder's layers, in its config and in the model that is built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from xllm.models.dense import DenseConfig, build_with
from xllm.models.model_config import ModelConfig
from xllm.models.raw_config import RawConfig
from xllm.parallel.shard import Shard

if TYPE_CHECKING:
    from xllm.layers.experts import SharedExpert
    from xllm.layers.layer_context import LayerContext, Weights
    from xllm.layers.mlp import GatedMLP
    from xllm.models.causal_lm import CausalLM
    from xllm.models.decoder import Factory, FeedForward

# Chosen, far beyond any model: a config's number alone must not make millions of experts.
MAX_EXPERTS = 2**16
EXPERT_OPS = frozenset({"route", "grouped_linear", "gated_grouped_linear", "combine"})
NUMBER_OF_EXPERTS = ("n_routed_experts", "num_local_experts", "num_experts")  # transformers takes any of them


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """layers: by layer, whether its mlp is a mixture. expert_size: width of each expert. shared_size: of the one beside
    them that every token has; 0: there is none. Without a layer that is a mixture, nothing else is said.

    num_chosen and what follows it: `backends/expert_choice.py:RouteRule`. is_corrected: the choice, and not the
    weights, depends on a number of each expert besides, its `e_score_correction_bias`. scores_in_fp32: whatever the
    compute dtype.
    """

    layers: tuple[bool, ...]
    num_experts: int = 0
    expert_size: int = 0
    shared_size: int = 0
    num_chosen: int = 0
    renormalise: bool = False
    sigmoid: bool = False
    num_groups: int = 1
    num_kept_groups: int = 1
    summed_per_group: int = 1
    scale: float = 1.0
    is_corrected: bool = False
    scores_in_fp32: bool = False

    @property
    def experts_a_token(self) -> int:
        """0: no layer is a mixture."""
        return self.num_chosen if any(self.layers) else 0

    @property
    def special_ops(self) -> frozenset[str]:
        return EXPERT_OPS if self.experts_a_token else frozenset()

    def check_shared(self, num_ranks: int) -> None:
        """See `ModelConfig.check_shared`."""
        Shard(0, 0, num_ranks).even_width(self.expert_size, "the width of an expert")
        Shard(0, 0, num_ranks).even_width(self.shared_size, "the width of the shared expert")


def read_number_of_experts(raw: RawConfig, default: int) -> tuple[int, int]:
    """How many there are, and how many of them a token has. Raises ModelError."""
    names = [name for name in NUMBER_OF_EXPERTS if raw.values.get(name) is not None]
    found = {raw.integer(name, high=MAX_EXPERTS) for name in names}
    if len(found) > 1:
        raise raw.error(f"{' and '.join(names)} differ ({' and '.join(map(str, sorted(found)))})")
    num_experts = found.pop() if found else default
    num_chosen = raw.integer("num_experts_per_tok", high=MAX_EXPERTS)
    if num_chosen > num_experts:
        raise raw.error(f"num_experts_per_tok ({num_chosen}) is more than there are experts ({num_experts})")
    return num_experts, num_chosen


def every_nth_layer(raw: RawConfig, num_layers: int) -> tuple[bool, ...]:
    """`Mixture.layers` by the Qwen rule: layer i unless it is in `mlp_only_layers`, if i + 1 is a multiple of
    `decoder_sparse_step`."""
    step, plain = raw.integer("decoder_sparse_step"), raw.values.get("mlp_only_layers") or []
    if not isinstance(plain, list) or any(isinstance(i, bool) or not isinstance(i, int) for i in plain):
        raise raw.error(f"mlp_only_layers must be a list of layer numbers, got {plain!r}")
    return tuple(i not in plain and (i + 1) % step == 0 for i in range(num_layers))


def expert_mlps(
    context: LayerContext, weights: Weights, mixture: Mixture, hidden_size: int, *,
    plain: Callable[[str], FeedForward],
    shared: Callable[[str], GatedMLP | SharedExpert],
    block: str = "mlp",
    parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> Factory[FeedForward]:
    """The mlp of each layer: experts, or what `plain` makes of its name. shared: what every token has beside its own
    experts, made of the mixture's name.

    block, parts: what a checkpoint whose experts stand apart calls the mixture, and an expert's gate, up and down.
    Where they are stacked, all checkpoints have the names of transformers 5.
    """
    from backends.expert_choice import RouteRule
    from xllm.layers.experts import Experts, ExpertShape

    if not any(mixture.layers):
        return lambda _, name: plain(name)
    rule = RouteRule(
        num_chosen=mixture.num_chosen, sigmoid=mixture.sigmoid, num_groups=mixture.num_groups,
        num_kept_groups=mixture.num_kept_groups, summed_per_group=mixture.summed_per_group,
        renormalise=mixture.renormalise, scale=mixture.scale)
    shape = ExpertShape(hidden_size=hidden_size, ffn_size=mixture.expert_size, num_experts=mixture.num_experts,
                        rule=rule, parts=parts, has_bias=mixture.is_corrected, scores_in_fp32=mixture.scores_in_fp32)

    def mlp(index: int, name: str) -> FeedForward:
        if not mixture.layers[index]:
            return plain(name)
        apart = f"{name.removesuffix('mlp')}{block}"
        name = name if weights.has(f"{name}.gate.weight") else apart
        return Experts(context, weights, name, shape, shared(name) if mixture.shared_size else None)

    return mlp


@dataclass(frozen=True, kw_only=True)
class MixtureConfig(DenseConfig):
    """A dense decoder's attention, and experts."""

    mixture: Mixture

    @property
    def experts_a_token(self) -> int:
        return self.mixture.experts_a_token

    @property
    def special_ops(self) -> frozenset[str]:
        return self.mixture.special_ops

    def check_shared(self, num_ranks: int) -> None:
        super().check_shared(num_ranks)
        self.mixture.check_shared(num_ranks)


def with_mixture(dense: DenseConfig, mixture: Mixture) -> MixtureConfig:
    return MixtureConfig(**mixture_fields(dense, mixture))


def mixture_fields(dense: DenseConfig, mixture: Mixture) -> dict[str, Any]:
    """Those of a `MixtureConfig`, by name."""
    return {**{field.name: getattr(dense, field.name) for field in fields(dense)}, "mixture": mixture}


def build(context: LayerContext, config: ModelConfig, weights: Weights) -> CausalLM:
    """`Family.build` of the Qwen families, whose shared expert has a gate of its own."""
    return build_mixture(context, config, weights)


def build_mixture(context: LayerContext, config: ModelConfig, weights: Weights, *, block: str = "mlp",
                  parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")) -> CausalLM:
    """block, parts: see `expert_mlps`."""
    from xllm.layers.experts import SharedExpert
    from xllm.layers.mlp import GatedMLP

    assert isinstance(config, MixtureConfig)
    hidden_size, ffn_size, shared_size = config.hidden_size, config.ffn_size, config.mixture.shared_size
    mlp = expert_mlps(
        context, weights, config.mixture, hidden_size, block=block, parts=parts,
        plain=lambda name: GatedMLP(context, weights, name, hidden_size, ffn_size, bias=config.mlp_bias),
        shared=lambda name: SharedExpert(context, weights, f"{name}.shared_expert", hidden_size, shared_size,
                                         gate=f"{name}.shared_expert_gate"))
    return build_with(context, config, weights, mlp)
