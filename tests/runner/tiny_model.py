"""One tiny random Qwen3 checkpoint, and what transformers computes with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor

VOCAB_SIZE = 211
PROMPT = [(17 * i * i + 5 * i + 3) % VOCAB_SIZE for i in range(37)]
NUM_NEW_TOKENS = 60


@dataclass(frozen=True)
class Truth:
    """Greedy decoding of PROMPT by transformers: the new tokens, and fp32 logits of all positions but the last."""

    tokens: list[int]
    logits_TV: Tensor


def save_checkpoint(folder: Path) -> Path:
    """The same weights each time, scaled so that logits differ clearly."""
    config = transformers.Qwen3Config(
        vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=112, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=256, bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=False)
    model = transformers.Qwen3ForCausalLM(config)
    generator = torch.Generator().manual_seed(20)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1.0 + 0.2 * noise if "norm" in name else noise * 1.5 / weight.shape[-1]**0.5)
    model.save_pretrained(folder)
    return folder


@torch.inference_mode()
def transformers_greedy(folder: Path) -> Truth:
    """Decode without a cache, in fp32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager").eval()
    tokens = list(PROMPT)
    while len(tokens) < len(PROMPT) + NUM_NEW_TOKENS:
        logits_TV = model(torch.tensor([tokens]), use_cache=False).logits[0]
        tokens.append(int(logits_TV[-1].argmax()))
    return Truth(tokens[len(PROMPT):], logits_TV)
