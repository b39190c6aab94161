"""Whole engines on the device, and the CPU's that say what they must generate."""

from __future__ import annotations

import functools
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.models.checkpoints import BY_ID, VOCAB_SIZE, Variant, deepseek, rope, save_checkpoint
from xllm import LLM, SamplingParams

os.environ["XLLM_NPU_CHECK"] = "1"
BUNDLED = "bundled"
TINY = ["llama-gqa", "mistral-window-21", "qwen2", "qwen3", "qwen3-mixed-windows"]
MIXTURES = ["mixtral", "qwen2-moe", "qwen3-moe"]
# What a device's attention is made for: a whole row of a head, in the dtype of most checkpoints.
WIDE = Variant("qwen3-head-dim-128-bf16", "Qwen3", {"head_dim": 128}, disk_dtype=torch.bfloat16)
# Of the widths that attention over latents is made for.
LATENT = Variant("deepseek-v3-latents-512", "DeepseekV3", deepseek(kv_lora_rank=512, qk_rope_head_dim=64, **rope(
    "yarn", factor=8.0, original_max_position_embeddings=32, mscale=0.9, mscale_all_dim=0.6)))
# And of those that keys and values are made of, where chunks are long: DeepSeek's own.
EXPANDED = Variant("deepseek-v3-heads-128", "DeepseekV3", deepseek(kv_lora_rank=512, qk_rope_head_dim=64,
                                                                   qk_nope_head_dim=128, v_head_dim=128))
NUM_TOKENS = 14
SHARED = [(7 * i * i + 3 * i + 11) % VOCAB_SIZE for i in range(130)]  # more than a block
PROMPTS = [
    [*SHARED, 5, 6, 7],
    [(17 * i * i + 5 * i + 3) % VOCAB_SIZE for i in range(37)],
    SHARED[:120],  # its 8th new token is the first of a block
    [3, 1, 4, 1, 5] * 6,
    [*SHARED, 9],
    [100, 50],
]
IS_REAL = os.environ.get("XLLM_NPU_REAL") == "1"
# Two tokens whose logprobs differ by less are as likely as each other: sums in float16 run in another order elsewhere.
TIE = 0.1 if IS_REAL else 0.02


@dataclass(frozen=True)
class Truth:
    """What a request generates. margins: by how much each token is more likely than the next best; greedy only."""

    tokens: list[int]
    margins: list[float]


@functools.cache
def folder(model: str) -> str:
    """Where a model lies: nothing for the bundled one, or a tiny random checkpoint that is made here."""
    if model == BUNDLED:
        return ""
    own = {variant.id: variant for variant in (WIDE, LATENT, EXPANDED)}
    return str(save_checkpoint({**BY_ID, **own}[model], Path(tempfile.mkdtemp())))


def sampling(number: int, seeded: bool) -> SamplingParams:
    rules: list[dict[str, Any]] = [{"top_k": 8}, {"top_p": 0.8}, {"min_p": 0.05}, {"repetition_penalty": 1.2},
                                   {"presence_penalty": 0.5, "frequency_penalty": 0.3}, {}]
    extra = {"temperature": 0.7, "seed": number, **rules[number % len(rules)]} if seeded else {"temperature": 0}
    return SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True, **extra)


def start(model: str, device: str, **settings: Any) -> LLM:
    options = {"dtype": "float16", "max_model_len": 192, "num_kv_blocks": 24, "block_size": 128, "num_threads": 1,
               "max_num_seqs": 8, "skip_tokenizer_init": True, "watermark": 0.0, **settings}
    return LLM(model=folder(model) or None, device=device, **options)


def tokens(llm: LLM, prompts: list[list[int]] = PROMPTS, *, seeded: bool = False) -> list[list[int]]:
    """What an engine generates for all prompts at once."""
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts],
                           [sampling(i, seeded) for i in range(len(prompts))], use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def prompt_logprobs(llm: LLM) -> torch.Tensor:
    """Of the tokens of one prompt."""
    prompt, wanted = PROMPTS[1], SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
    output = llm.generate([{"prompt_token_ids": prompt}], wanted, use_tqdm=False)[0]
    return torch.tensor([entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], prompt[1:])])


@functools.cache
def plain(model: str, quantization: str | None = None, device: str = "cpu", dtype: str = "float16") -> list[Truth]:
    """Greedy tokens of the CPU, or of one device, every feature off."""
    wanted = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=2)
    with start(model, device, async_scheduling=False, enable_prefix_caching=False, quantization=quantization,
               dtype=dtype, graph_mode="off") as llm:
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], wanted, use_tqdm=False)
    return [Truth(list(o.outputs[0].token_ids), [_margin(entry) for entry in o.outputs[0].logprobs]) for o in outputs]


def _margin(entry: dict[int, Any]) -> float:
    best, second = sorted((found.logprob for found in entry.values()), reverse=True)[:2]
    return best - second


def assert_same(found: list[list[int]], expected: list[Truth], tie: float = TIE) -> None:
    """Equal, but that a sequence may go its own way where two tokens were as likely; few do so, and late."""
    compared = 0
    for mine, truth in zip(found, expected, strict=True):
        assert len(mine) == len(truth.tokens)
        differs = next((i for i, (a, b) in enumerate(zip(mine, truth.tokens)) if a != b), None)
        assert differs is None or truth.margins[differs] <= tie, (differs, mine, truth)
        compared += len(mine) if differs is None else differs
    assert compared >= 0.7 * sum(map(len, found)), (found, expected)
