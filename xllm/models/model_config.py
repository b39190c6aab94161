"""`ModelConfig`: what the engine asks of any checkpoint's config.json. A family's own subclass has the rest.

Neither transformers nor torch is imported here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

from xllm.errors import ModelError
from xllm.layers.rope_config import RopeConfig, read_rope
from xllm.models.fp8_format import Fp8Format
from xllm.models.kv_spec import KVSpec
from xllm.models.raw_config import MAX_SIZE, RawConfig

if TYPE_CHECKING:
    from backends.backend import Backend

CHECKPOINT_DTYPES = ("float32", "bfloat16", "float16")
MAX_LAYERS = 4096  # chosen, far beyond any model: a config's number alone must not make millions of layers


@dataclass(frozen=True, kw_only=True)
class ModelConfig(ABC):
    """A causal language model.

    max_model_len: the longest sequence, rope scaling included. checkpoint_dtype: "bfloat16" etc.
    eos_token_ids: of generation_config.json and config.json together. fp8: of its matrices; None: they are not.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    max_model_len: int
    checkpoint_dtype: str
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    fp8: Fp8Format | None = None

    @property
    def has_head(self) -> bool:
        """Whether the architecture has an lm_head: `Qwen3ForCausalLM` does, `Qwen3Model` does not."""
        return not self.architecture.endswith("Model")

    @property
    def exact_model_len(self) -> int:
        """The longest sequence whose result does not depend on how the sequence came to be that long."""
        return self.max_model_len

    @property
    def experts_a_token(self) -> int:
        """How many experts a layer chooses for each token; 0: no layer has any."""
        return 0

    def attention_bytes(self, backend: Backend, *, num_tokens: int, num_positions: int, longest: int, num_shares: int,
                        itemsize: int) -> int:
        """What a layer's attention takes at most on one of the ranks that share the model, besides queries, keys,
        values and results of a step of so many tokens, whose sequences have so many positions together, and one of them
        `longest` at most."""
        return 0

    @property
    def attention_varies(self) -> bool:
        """Whether operators choose the form of a sequence's attention by how many queries and positions it has."""
        return False

    @property
    @abstractmethod
    def kv_specs(self) -> tuple[KVSpec, ...]:
        """What a KV block holds, layer by layer, all ranks together."""

    @property
    def special_ops(self) -> frozenset[str]:
        """Operators that it needs and most models do not, by their names in `OpSet`."""
        return frozenset()

    def check_shared(self, num_ranks: int) -> None:
        """Raise ConfigError, with the number that does not divide, unless so many tensor-parallel ranks can share
        it."""
        for spec in self.kv_specs:
            spec.on_one_of(num_ranks)


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(ModelConfig):
    """What `models/decoder.py` asks besides, whose layers are an attention and an mlp, each behind a norm."""

    rms_norm_eps: float
    tie_word_embeddings: bool
    rope: RopeConfig

    @property
    def exact_model_len(self) -> int:
        return min(self.max_model_len, self.rope.exact_len(self.max_model_len))


class CommonFields(TypedDict):
    """The fields of `DecoderConfig` that all families read from the same keys."""

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    max_model_len: int
    checkpoint_dtype: str
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    rms_norm_eps: float
    tie_word_embeddings: bool
    rope: RopeConfig


def read_common(raw: RawConfig, architecture: str, *, rotates_parts: bool = False) -> CommonFields:
    """rotates_parts: the family can rotate a part of each head. Raises ModelError, naming file and key, for what is
    missing or cannot be."""
    rope, max_model_len = _read_lengths(raw, rotates_parts)
    return CommonFields(
        architecture=architecture,
        vocab_size=raw.integer("vocab_size"),
        hidden_size=raw.integer("hidden_size"),
        num_layers=raw.integer("num_hidden_layers", high=MAX_LAYERS),
        max_model_len=max_model_len,
        checkpoint_dtype=_read_dtype(raw),
        eos_token_ids=raw.token_ids("eos_token_id"),
        bos_token_id=next(iter(raw.token_ids("bos_token_id")), None),
        rms_norm_eps=raw.fraction("rms_norm_eps"),
        tie_word_embeddings=raw.flag("tie_word_embeddings"),
        rope=rope,
    )


def _read_lengths(raw: RawConfig, rotates_parts: bool) -> tuple[RopeConfig, int]:
    max_positions = raw.integer("max_position_embeddings")
    try:
        rope = read_rope(raw.values, max_position_embeddings=max_positions, default_theta=10000.0,
                         may_be_partial=rotates_parts)
    except ModelError as error:
        raise raw.error(str(error)) from None
    max_model_len = rope.max_model_len(max_positions)
    if not 1 <= max_model_len <= MAX_SIZE:
        raise raw.error(f"rope factor {rope.factor:g} makes the longest sequence {max_model_len} tokens")
    return rope, max_model_len


def _read_dtype(raw: RawConfig) -> str:
    """`dtype` (transformers 5) or `torch_dtype`; float32 where neither is given, as torch itself has it."""
    dtype = raw.values.get("dtype") or raw.values.get("torch_dtype") or "float32"
    name = str(dtype).removeprefix("torch.")
    if name not in CHECKPOINT_DTYPES:
        raise raw.error(f"dtype {dtype!r} is not supported; supported: {', '.join(CHECKPOINT_DTYPES)}")
    return name
