"""What the finished model is worth: held-out bits per byte beside gzip, and samples of its text."""

from __future__ import annotations

import gzip
import math

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import nn

from tools.train_demo.chat import END_OF_TEXT, IM_END, IM_START
from tools.train_demo.corpus import SourceFile

SAMPLE_PROMPTS = ["def read_lines(path):\n", "import os\n\nclass"]
SAMPLE_QUESTIONS = ["Hello!", "Write a Python function `is_empty`. Return True if the list is empty."]


@torch.inference_mode()
def negative_log_likelihood(model: nn.Module, tokens: list[int], window: int) -> float:
    """Return the text's total cost in nats; windows overlap by half, so that context is never short."""
    total, scored = 0.0, 1  # the first token, end-of-text, is given
    while scored < len(tokens):
        start = max(0, scored - window // 2)
        part = torch.tensor([tokens[start:start + window]])
        costs = F.cross_entropy(model(part[:, :-1]).logits[0].float(), part[0, 1:], reduction="none")
        total += costs[scored - start - 1:].sum().item()
        scored = start + part.shape[1]
    return total


def compare_with_gzip(
    model: nn.Module, tokenizer: Tokenizer, files: list[SourceFile], window: int
) -> dict[str, float]:
    """Return held-out bits per byte of the model and of gzip -9."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    texts = [file.text for file in files]
    size = sum(len(text.encode()) for text in texts)
    nats = sum(negative_log_likelihood(model, [end, *tokenizer.encode(text).ids], window) for text in texts)
    separate = sum(len(gzip.compress(text.encode(), 9, mtime=0)) for text in texts)
    together = len(gzip.compress("".join(texts).encode(), 9, mtime=0))
    return {"files": len(files), "bytes": size, "model": nats / math.log(2) / size,
            "gzip_separate": 8 * separate / size, "gzip_together": 8 * together / size}


def continue_text(model: nn.Module, tokenizer: Tokenizer, prompt: str, max_new_tokens: int = 96) -> str:
    """Return the greedy continuation of a prompt."""
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    ends = [tokenizer.token_to_id(IM_END), tokenizer.token_to_id(END_OF_TEXT)]
    output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, temperature=None,
                            top_p=None, max_new_tokens=max_new_tokens, eos_token_id=ends,
                            pad_token_id=ends[1])
    return tokenizer.decode(output[0, ids.shape[1]:].tolist())


def samples(model: nn.Module, tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """Return prompts and what the model makes of them."""
    pairs = [(prompt, prompt + continue_text(model, tokenizer, prompt)) for prompt in SAMPLE_PROMPTS]
    for question in SAMPLE_QUESTIONS:
        prompt = f"{IM_START}user\n{question}{IM_END}\n{IM_START}assistant\n"
        pairs.append((question, continue_text(model, tokenizer, prompt)))
    return pairs
