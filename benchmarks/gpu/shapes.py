"""`ModelShape`: the sizes of the models that are measured, and their config.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A dense decoder-only transformer. Parameters are counted, bytes are theirs in 16 bits."""

    name: str
    family: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    head_dim: int = 128
    tied: bool = False
    max_len: int = 40960

    @property
    def layer_params(self) -> int:
        """Of all matrices in all layers; norms and biases are too small to matter."""
        projections = 2 * self.heads * self.head_dim + 2 * self.kv_heads * self.head_dim
        return self.layers * self.hidden * (projections + 3 * self.ffn)

    @property
    def head_params(self) -> int:
        return self.vocab * self.hidden

    @property
    def read_params(self) -> int:
        """What a decode step reads: layers and lm_head; of the embedding table only a few rows."""
        return self.layer_params + self.head_params

    @property
    def kv_bytes(self) -> int:
        """Of one token, keys and values of all layers, in 16 bits."""
        return self.layers * self.kv_heads * self.head_dim * 2 * 2

    def config(self, dtype: str = "bfloat16") -> dict[str, Any]:
        """What its config.json says."""
        return {
            "architectures": [f"{self.family}ForCausalLM"], "model_type": self.family.lower(), "hidden_act": "silu",
            "hidden_size": self.hidden, "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads, "head_dim": self.head_dim, "intermediate_size": self.ffn,
            "vocab_size": self.vocab, "max_position_embeddings": self.max_len, "rms_norm_eps": 1e-6,
            "rope_theta": 1e6, "attention_bias": False, "tie_word_embeddings": self.tied,
            "use_sliding_window": False, "dtype": dtype, "bos_token_id": None, "eos_token_id": None,
            "pad_token_id": 0,
        }  # fmt: skip

    def write(self, folder: Path, dtype: str = "bfloat16") -> Path:
        """A folder with its config.json and no weights, for `load_format="dummy"`; returns the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config(dtype), indent=1))
        return folder


def _qwen3(name: str, hidden: int, layers: int, heads: int, ffn: int, *, tied: bool) -> ModelShape:
    return ModelShape(name=name, family="Qwen3", hidden=hidden, layers=layers, heads=heads, kv_heads=8, ffn=ffn,
                      vocab=151_936, tied=tied)


SHAPES = {shape.name: shape for shape in (
    _qwen3("qwen3-0.6b", 1024, 28, 16, 3072, tied=True),
    _qwen3("qwen3-1.7b", 2048, 28, 16, 6144, tied=True),
    _qwen3("qwen3-4b", 2560, 36, 32, 9728, tied=True),
    _qwen3("qwen3-8b", 4096, 36, 32, 12288, tied=False),
    _qwen3("qwen3-14b", 5120, 40, 40, 17408, tied=False),
    _qwen3("qwen3-32b", 5120, 64, 64, 25600, tied=False),
    ModelShape(name="llama-3.1-8b", family="Llama", hidden=4096, layers=32, heads=32, kv_heads=8, ffn=14336,
               vocab=128_256, max_len=131_072),
    ModelShape(name="tiny", family="Qwen3", hidden=64, layers=2, heads=4, kv_heads=2, ffn=128, vocab=512, head_dim=16,
               max_len=512),
)}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ExpertLayer:
    """A layer of experts, of which each token has `num_chosen`; ffn: the width of each."""

    name: str
    hidden: int
    ffn: int
    num_experts: int
    num_chosen: int


QWEN3_30B = ExpertLayer(name="qwen3-30b-a3b", hidden=2048, ffn=768, num_experts=128, num_chosen=8)
FEW_EXPERTS = ExpertLayer(name="few-experts", hidden=64, ffn=40, num_experts=8, num_chosen=2)


def expert_layer(*, large: bool) -> ExpertLayer:
    """What is measured on a GPU, and in a dry run."""
    return QWEN3_30B if large else FEW_EXPERTS
