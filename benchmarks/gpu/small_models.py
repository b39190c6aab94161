"""Small checkpoints with random float32 weights, written by transformers, and what transformers computes with them.

Beside the weights of a checkpoint lie adapters for it, and a tokenizer with a token for each byte."""

from __future__ import annotations

import json
import string
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from backends.reference.kv_codes import dequantise, quantise
from benchmarks.gpu.op_cases import in_codes, rounded

VOCAB = 1031
NUM_HEADS = 8
SIZES = {"vocab_size": VOCAB, "num_hidden_layers": 3, "num_attention_heads": NUM_HEADS, "num_key_value_heads": 2,
         "max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}  # fmt: skip
# On a GPU the head size that its kernels are made for; a dry run is to be short.
LARGE = {"hidden_size": 1024, "intermediate_size": 1536, "head_dim": 128}
SMALL = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True}
NUM_ADAPTERS, RANK, ALPHA = 2, 4, 8
ADAPTED = ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj")
NUM_LETTERS = 9
REGEX = f"[a-z]{{{NUM_LETTERS}}}"
END, END_ID = "<end>", 256
HEAD_SCALE = 4.0  # of lm_head, so that the likeliest token is ahead by more than rounding


def save(family: str, folder: Path, *, large: bool) -> Path:
    """Write a checkpoint of "Llama", "Qwen2", "Qwen3" or "Qwen3Moe"; the same weights each time."""
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    sizes = LARGE if large else SMALL
    if family == "Qwen2":  # its head size follows from the hidden size
        sizes = {**sizes, "hidden_size": NUM_HEADS * sizes["head_dim"]}
    if family.endswith("Moe"):
        sizes = {**sizes, **EXPERTS, "moe_intermediate_size": sizes["intermediate_size"] // 2}
    config = getattr(transformers, f"{family}Config")(**SIZES, **sizes, tie_word_embeddings=family == "Qwen3")
    model = getattr(transformers, f"{family}ForCausalLM")(config).float()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(_weight(name, weight.shape, generator))
    model.save_pretrained(folder)
    for i, name in enumerate(adapter_names(NUM_ADAPTERS)):
        _save_adapter(folder / name, model, seed=i)
    _save_tokenizer(folder)
    return folder


def adapter_names(count: int) -> list[str]:
    """Of their folders, beside the checkpoint's files."""
    return [f"adapter-{i}" for i in range(count)]


def _save_adapter(folder: Path, model: nn.Module, seed: int) -> None:
    """In PEFT's format; strong enough to change most tokens."""
    from safetensors.torch import save_file

    generator, tensors = torch.Generator().manual_seed(seed), dict[str, Tensor]()
    for name, layer in model.named_modules():
        if name.endswith(ADAPTED) and isinstance(layer, nn.Linear):
            stem, (Y, X) = f"base_model.model.{name}", layer.weight.shape
            tensors[f"{stem}.lora_A.weight"] = torch.randn(RANK, X, generator=generator) / X**0.5
            tensors[f"{stem}.lora_B.weight"] = torch.randn(Y, RANK, generator=generator) * 0.3 / RANK**0.5
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA}))


def _letters() -> list[str]:
    """How a byte-level tokenizer writes the 256 bytes, in the order of their ids."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def letter_ids() -> list[int]:
    """Of the tokens a to z."""
    ids = {letter: id for id, letter in enumerate(_letters())}
    return [ids[letter] for letter in string.ascii_lowercase]


def _save_tokenizer(folder: Path) -> None:
    """A token for each byte, and an end token; the model's other tokens have no text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocab={letter: id for id, letter in enumerate(_letters())}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))


def _weight(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=generator)
    if "norm" in name:
        return 1.0 + 0.2 * noise
    if name.endswith("bias"):
        return 0.3 * noise
    return noise * (HEAD_SCALE if "lm_head" in name or "embed" in name else 1.5) / shape[-1] ** 0.5


class Truth:
    """transformers, eager, in float32 on the device, with other numbers where the engine is to have them.

    kv_format: keys and values are rounded as a cache of that rounds them. quantization: weights are, as `pack_linear`
    rounds them, and for "w8a8" what they multiply. adapter: the name of one that is added to the weights.
    stored_as: the dtype that all weights are rounded to.
    """

    def __init__(self, folder: Path, device: torch.device, *, kv_format: str | None = None,
                 quantization: str | None = None, adapter: str = "", stored_as: torch.dtype = torch.float32):
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        self._model, self._device, self._kv_format = model.eval().to(device), device, kv_format
        with torch.no_grad():
            for weight in model.parameters():
                weight.copy_(weight.to(stored_as))
            if adapter:
                _add_adapter(model, folder / adapter)
            if quantization:
                _quantise_linears(model, quantization)

    @torch.inference_mode()
    def logprobs(self, token_ids: Sequence[int]) -> Tensor:
        """Of the token that follows each place: float64 [T, V] on the CPU, all tokens given at once."""
        with rounded_kv(self._model, self._kv_format):
            logits_TV = self._model(torch.tensor([list(token_ids)], device=self._device)).logits[0]
        return logits_TV.double().log_softmax(-1).cpu()


def _add_adapter(model: nn.Module, folder: Path) -> None:
    from safetensors.torch import load_file

    tensors, changed = load_file(folder / "adapter_model.safetensors"), 0
    for name, layer in model.named_modules():
        key = f"base_model.model.{name}.lora_A.weight"
        if isinstance(layer, nn.Linear) and key in tensors:
            a, b = (tensors[key.replace("_A", f"_{which}")].to(layer.weight.device) for which in "AB")
            layer.weight += ALPHA / RANK * (b @ a)
            changed += 1
    assert 2 * changed == len(tensors), "an adapter's matrices have not all found their layer"


def _quantise_linears(model: nn.Module, quantization: str) -> None:
    """Every matrix product, lm_head included; a token table that lm_head is tied to stays as it is."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.weight = nn.Parameter(rounded(layer.weight, quantization).float(), requires_grad=False)
            if quantization == "w8a8":
                layer.register_forward_pre_hook(_in_codes)


def _in_codes(layer: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    x = inputs[0]
    return (in_codes(x.flatten(0, -2)).float().view(x.shape),)


@contextmanager
def rounded_kv(model: nn.Module, format: str | None) -> Iterator[None]:
    """Inside, the model's eager attention sees keys and values as a cache of this format gives them back."""
    module: Any = sys.modules[type(model).__module__]
    eager: Callable[..., Any] = module.eager_attention_forward

    def attend(layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Any:
        if format is not None:
            key, value = (dequantise(*quantise(x, format, dim=-1), format) for x in (key, value))
        return eager(layer, query, key, value, *rest, **options)

    module.eager_attention_forward = attend
    try:
        yield
    finally:
        module.eager_attention_forward = eager
