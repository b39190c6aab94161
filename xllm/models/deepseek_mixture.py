"""The experts of DeepSeek V2 and V3, and of families that route as V3 does."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from xllm.models.mixture import MAX_EXPERTS, Mixture, expert_mlps, read_number_of_experts
from xllm.models.raw_config import RawConfig

if TYPE_CHECKING:
    from xllm.layers.layer_context import LayerContext, Weights
    from xllm.models.decoder import Factory, FeedForward

GREEDY, WITHIN_GROUPS, CORRECTED = "greedy", "group_limited_greedy", "noaux_tc"


def layers_from(raw: RawConfig, num_layers: int) -> tuple[bool, ...]:
    """`Mixture.layers`: from `first_k_dense_replace` on, those whose number is a multiple of `moe_layer_freq`.
    transformers does not read the latter, which is 1 in all released checkpoints; DeepSeek's own code does."""
    first, step = raw.whole("first_k_dense_replace"), raw.optional_integer("moe_layer_freq") or 1
    return tuple(layer >= first and layer % step == 0 for layer in range(num_layers))


def read_v2_mixture(raw: RawConfig, layers: tuple[bool, ...], *, num_experts: int) -> Mixture:
    """Softmax scores, their sum not brought to one. A group of experts is as good as its best. If no layer has experts,
    what the config says of them is not read.

    num_experts: where the file says none. Raises ModelError.
    """
    if not any(layers):
        return Mixture(layers=layers)
    _check_word(raw, "scoring_func", "softmax")
    method = _check_word(raw, "topk_method", GREEDY, WITHIN_GROUPS)
    if raw.flag("norm_topk_prob"):
        raise raw.error("norm_topk_prob is not built for DeepSeek V2: its own code then leaves out "
                        "routed_scaling_factor, and transformers does not read it")
    mixture = _read(raw, layers, num_experts)
    return _grouped(raw, mixture, summed_per_group=1) if method == WITHIN_GROUPS else mixture


def read_v3_mixture(raw: RawConfig, layers: tuple[bool, ...], *, num_experts: int) -> Mixture:
    """Sigmoid scores. The choice is by their sums with a bias of each expert, and a group is as good as its best two
    together; the weights are the scores alone. Otherwise as `read_v2_mixture`."""
    if not any(layers):
        return Mixture(layers=layers)
    _check_word(raw, "scoring_func", "sigmoid")
    _check_word(raw, "topk_method", CORRECTED)
    mixture = replace(_read(raw, layers, num_experts), sigmoid=True, is_corrected=True,
                      renormalise=raw.flag("norm_topk_prob"))
    return _grouped(raw, mixture, summed_per_group=2)


def _read(raw: RawConfig, layers: tuple[bool, ...], default: int) -> Mixture:
    num_experts, num_chosen = read_number_of_experts(raw, default)
    expert_size = raw.integer("moe_intermediate_size")
    return Mixture(
        layers=layers, num_experts=num_experts, num_chosen=num_chosen, expert_size=expert_size,
        shared_size=expert_size * raw.whole("n_shared_experts", high=MAX_EXPERTS),
        scale=raw.number("routed_scaling_factor"), scores_in_fp32=True)


def _grouped(raw: RawConfig, mixture: Mixture, *, summed_per_group: int) -> Mixture:
    """Raises ModelError for groups that cannot be, and where those that are kept have too few experts."""
    num_groups, num_kept = (raw.integer(key, high=MAX_EXPERTS) for key in ("n_group", "topk_group"))
    size = mixture.num_experts // num_groups
    if mixture.num_experts % num_groups or size < summed_per_group:
        raise raw.error(f"n_group ({num_groups}) cannot share {mixture.num_experts} experts evenly, at least "
                        f"{summed_per_group} to each")
    if num_kept > num_groups or num_kept * size < mixture.num_chosen:
        raise raw.error(f"topk_group ({num_kept}) of n_group ({num_groups}) groups of {size} experts leaves no "
                        f"{mixture.num_chosen} to choose (num_experts_per_tok)")
    return replace(mixture, num_groups=num_groups, num_kept_groups=num_kept, summed_per_group=summed_per_group)


def _check_word(raw: RawConfig, key: str, *built: str) -> str:
    """The value, which must be one of those; the first where there is none."""
    value = raw.values.get(key)
    if value is not None and value not in built:
        raise raw.error(f"{key} {value!r} is not supported; supported: {', '.join(built)}")
    return built[0] if value is None else str(value)


def deepseek_mlps(context: LayerContext, weights: Weights, mixture: Mixture, *, hidden_size: int, ffn_size: int,
                  bias: bool) -> Factory[FeedForward]:
    """The mlp of each layer. bias: of the gated mlps, the shared expert's too."""
    from xllm.layers.mlp import GatedMLP

    def plain(name: str) -> GatedMLP:
        return GatedMLP(context, weights, name, hidden_size, ffn_size, bias=bias)

    return expert_mlps(
        context, weights, mixture, hidden_size, plain=plain,
        shared=lambda name: GatedMLP(context, weights, f"{name}.shared_experts", hidden_size, mixture.shared_size,
                                     bias=bias))
