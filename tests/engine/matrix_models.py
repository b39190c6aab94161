"""The models of the feature matrix: the bundled one, and small ones of random numbers with its tokenizer, whose layers
are of another kind. Each has two adapters."""

from __future__ import annotations

import atexit
import contextlib
import functools
import shutil
import tempfile
from pathlib import Path

from safetensors.torch import load_file, save_file

from tests.adapters import write_adapter
from tests.models.checkpoints import Variant, save_checkpoint
from xllm import bundled

BUNDLED = Path(bundled.__file__).parent
_SIZES = {"vocab_size": 4096, "hidden_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 2048,
          "tie_word_embeddings": True}
_RANDOM = {
    "dense": Variant("dense", "Qwen3", {**_SIZES, "head_dim": 16}),
    "moe": Variant("moe", "Qwen3Moe", {
        **_SIZES, "head_dim": 16, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40,
        "norm_topk_prob": True}),
    "mla": Variant("mla", "DeepseekV3", {
        **_SIZES, "num_key_value_heads": 4, "kv_lora_rank": 32, "q_lora_rank": 40, "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8, "v_head_dim": 20, "first_k_dense_replace": 1, "moe_intermediate_size": 40,
        "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "n_shared_experts": 1,
        "routed_scaling_factor": 1.5}),
}
# Larger: what comes is more like what was. Chosen so that drafts are taken, and not only of one token over and over.
REPEATS = 3.0
MODELS = tuple(_RANDOM)
# What the adapters change.
_PROJECTIONS = {"bundled": ("q_proj", "down_proj"), "dense": ("q_proj", "down_proj"), "moe": ("q_proj", "o_proj"),
                "mla": ("q_b_proj", "o_proj")}
_folders = contextlib.ExitStack()
atexit.register(_folders.close)


def _new_folder() -> Path:
    """Removed when the process ends."""
    return Path(_folders.enter_context(tempfile.TemporaryDirectory()))


@functools.cache
def model_folder(name: str) -> Path:
    """name: one of MODELS, or "bundled"."""
    if name == "bundled":
        return BUNDLED
    folder = save_checkpoint(_RANDOM[name], _new_folder())
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"] *= REPEATS
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED / file, folder)
    return folder


@functools.cache
def adapters(model: str) -> tuple[str, ...]:
    """`lora_modules` of the adapters a and b."""
    folder = _new_folder()
    for seed, name in enumerate("ab"):
        write_adapter(folder / name, seed, model=model_folder(model), projections=_PROJECTIONS[model])
    return tuple(f"{name}={folder / name}" for name in "ab")


