"""Dense decoders: what Llama, Mistral, Qwen2 and Qwen3 share. Their own files say what a config of theirs means."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from xllm.models.kv_spec import KVSpec
from xllm.models.model_config import MAX_LAYERS, DecoderConfig, ModelConfig, read_common
from xllm.models.raw_config import RawConfig
from xllm.parallel.shard import Shard, share_heads

if TYPE_CHECKING:
    from xllm.layers.layer_context import LayerContext, Weights
    from xllm.models.causal_lm import CausalLM
    from xllm.models.decoder import Factory, FeedForward

# Chosen, far beyond any model: the tables of rotations are as wide as a head, and no tensor of the checkpoint bounds
# them.
MAX_HEAD_DIM = 4096


@dataclass(frozen=True, kw_only=True)
class DenseConfig(DecoderConfig):
    """Attention over keys and values, and a gated mlp. `sliding_windows`: by layer, None for full attention."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    sliding_windows: tuple[int | None, ...]
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    @property
    def kv_specs(self) -> tuple[KVSpec, ...]:
        return tuple(KVSpec(num_heads=self.num_kv_heads, widths=(self.head_dim, self.head_dim), sliding_window=window)
                     for window in self.sliding_windows)

    def check_shared(self, num_ranks: int) -> None:
        share_heads(self.num_heads, self.num_kv_heads, rank=0, size=num_ranks)
        Shard(0, 0, num_ranks).even_width(self.ffn_size, "the width of the mlp")


def read_dense(
    raw: RawConfig,
    architecture: str,
    *,
    sliding_windows: tuple[int | None, ...],
    qkv_bias: bool = False,
    o_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
    rotates_parts: bool = False,
) -> DenseConfig:
    """The keywords are what the family decides. Raises ModelError."""
    check_activation(raw)
    common = read_common(raw, architecture, rotates_parts=rotates_parts)
    num_heads = raw.integer("num_attention_heads")
    num_kv_heads = raw.optional_integer("num_key_value_heads") or num_heads
    head_dim = raw.optional_integer("head_dim", high=MAX_HEAD_DIM) or common["hidden_size"] // num_heads
    if num_heads % num_kv_heads:
        raise raw.error(f"num_attention_heads ({num_heads}) is not a multiple of num_key_value_heads ({num_kv_heads})")
    if head_dim % 2 or not 4 <= head_dim <= MAX_HEAD_DIM:
        raise raw.error(f"head_dim must be even and in [4, {MAX_HEAD_DIM}], got {head_dim}")
    rotated_dim = common["rope"].rotated_dim(head_dim)
    if rotated_dim % 2 or rotated_dim < 4:
        raise raw.error(f"partial_rotary_factor {common['rope'].rotated_share:g} rotates {rotated_dim} of {head_dim} "
                        "numbers of a head; it must be an even number from 4 on")
    return DenseConfig(
        **common, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim,
        ffn_size=raw.integer("intermediate_size"), sliding_windows=sliding_windows, qkv_bias=qkv_bias, o_bias=o_bias,
        mlp_bias=mlp_bias, qk_norm=qk_norm)


def check_activation(raw: RawConfig) -> None:
    """Raise ModelError unless the mlp's activation is SiLU."""
    activation = raw.values.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise raw.error(f"hidden_act {activation!r} is not supported; only 'silu' is")


def full_attention(raw: RawConfig) -> tuple[None, ...]:
    """`sliding_windows` of a model that has none."""
    return (None,) * raw.integer("num_hidden_layers", high=MAX_LAYERS)


def from_there_on(layer: int, first: int) -> bool:
    """Which layers have a window, by `max_window_layers`: Qwen2's and Qwen3's rule."""
    return layer >= first


def window_per_layer(raw: RawConfig, is_windowed: Callable[[int, int], bool] = from_there_on) -> tuple[int | None, ...]:
    """`sliding_windows` by the Qwen rule: `layer_types` where given, else by `max_window_layers` as `is_windowed` of
    layer and that number says, and in both cases only if `use_sliding_window`."""
    num_layers = raw.integer("num_hidden_layers", high=MAX_LAYERS)
    window = raw.optional_integer("sliding_window") if raw.flag("use_sliding_window") else None
    types = raw.values.get("layer_types")
    if types is None:
        first = raw.values.get("max_window_layers")
        if isinstance(first, bool) or not isinstance(first, int):
            raise raw.error(f"max_window_layers must be an integer, got {first!r}")
        return tuple(window if is_windowed(layer, first) else None for layer in range(num_layers))
    if not isinstance(types, list) or len(types) != num_layers:
        raise raw.error(f"layer_types must be a list with one entry for each of the {num_layers} layers")
    unknown = [kind for kind in types if kind not in ("full_attention", "sliding_attention")]
    if unknown:
        raise raw.error(f"layer type {unknown[0]!r} is not supported; supported: full_attention, sliding_attention")
    if window is None and "sliding_attention" in types:
        raise raw.error("layer_types names sliding_attention, but use_sliding_window is off or sliding_window missing")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def build(context: LayerContext, config: ModelConfig, weights: Weights) -> CausalLM:
    """`Family.build` of every dense family."""
    from xllm.layers.mlp import GatedMLP

    assert isinstance(config, DenseConfig)
    width, hidden_size, bias = config.ffn_size, config.hidden_size, config.mlp_bias
    return build_with(context, config, weights, lambda _, name: GatedMLP(context, weights, name, hidden_size, width,
                                                                         bias=bias))


def build_with(context: LayerContext, config: DenseConfig, weights: Weights, mlp: Factory[FeedForward]) -> CausalLM:
    """A model with a dense one's attention, and an mlp of its own in each layer."""
    from xllm.layers.attention import Attention, AttentionShape, attention_plan
    from xllm.layers.rotary import rope_table
    from xllm.models.decoder import Decoder

    cos_sin_LH = rope_table(config.rope, config.head_dim, context.max_model_len, context.device)

    def attention(index: int, name: str) -> Attention:
        shape = AttentionShape(
            hidden_size=config.hidden_size, num_heads=config.num_heads, num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim, qkv_bias=config.qkv_bias, o_bias=config.o_bias,
            qk_norm_eps=config.rms_norm_eps if config.qk_norm else None, sliding_window=config.sliding_windows[index],
            rotated_dim=config.rope.rotated_dim(config.head_dim))
        return Attention(context, weights, name, shape, cos_sin_LH)

    plan = attention_plan(context, config.num_heads, config.num_kv_heads, config.head_dim)
    return Decoder(context, config, weights, attention=attention, mlp=mlp, plan=plan)
