"""Small checkpoints with random float32 weights, written by transformers, and what transformers computes with them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VOCAB = 1031
SIZES = {"vocab_size": VOCAB, "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 2,
         "max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}  # fmt: skip
# On a GPU the head size that its kernels are made for; a dry run is to be short.
LARGE = {"hidden_size": 1024, "intermediate_size": 1536, "head_dim": 128}
SMALL = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
HEAD_SCALE = 4.0  # of lm_head, so that the likeliest token is ahead by more than rounding


def save(family: str, folder: Path, *, large: bool) -> Path:
    """Write a checkpoint of "Llama", "Qwen2" or "Qwen3"; the same weights each time."""
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    sizes = LARGE if large else SMALL
    if family == "Qwen2":  # its head size follows from the hidden size
        sizes = {**sizes, "hidden_size": SIZES["num_attention_heads"] * sizes["head_dim"]}
    config = getattr(transformers, f"{family}Config")(**SIZES, **sizes, tie_word_embeddings=family == "Qwen3")
    model = getattr(transformers, f"{family}ForCausalLM")(config).float()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(_weight(name, weight.shape, generator))
    model.save_pretrained(folder)
    return folder


def _weight(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=generator)
    if "norm" in name:
        return 1.0 + 0.2 * noise
    if name.endswith("bias"):
        return 0.3 * noise
    return noise * (HEAD_SCALE if "lm_head" in name or "embed" in name else 1.5) / shape[-1] ** 0.5


class Truth:
    """transformers, eager, in float32 on the device."""

    def __init__(self, folder: Path, device: torch.device):
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        self._model, self._device = model.eval().to(device), device

    @torch.inference_mode()
    def logprobs(self, token_ids: Sequence[int]) -> Tensor:
        """Of the token that follows each place: float64 [T, V] on the CPU, all tokens given at once."""
        logits_TV = self._model(torch.tensor([list(token_ids)], device=self._device)).logits[0]
        return logits_TV.double().log_softmax(-1).cpu()
