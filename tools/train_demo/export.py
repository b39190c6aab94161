"""The checkpoint in Hugging Face format."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tools.train_demo.chat import CHAT_TEMPLATE, END_OF_TEXT, IM_END
from tools.train_demo.network import ModelConfig


def write_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat template."""
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=IM_END, pad_token=END_OF_TEXT, model_max_length=max_length,
        clean_up_tokenization_spaces=False, chat_template=CHAT_TEMPLATE,
    )
    wrapped.save_pretrained(folder)
    config_path = folder / "tokenizer_config.json"
    settings = json.loads(config_path.read_text())
    # The general class, known to every version of transformers, and the template also where older ones look.
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False,
                 "chat_template": CHAT_TEMPLATE}
    config_path.write_text(json.dumps(settings, indent=2) + "\n")


def write_config(config: ModelConfig, tokenizer: Tokenizer, folder: Path) -> None:
    """Write config.json and generation_config.json."""
    end_ids = [tokenizer.token_to_id(IM_END), tokenizer.token_to_id(END_OF_TEXT)]
    settings = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **vars(config),
        # The rotary base where newer versions of transformers look; `rope_theta` is for the older ones.
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "hidden_act": "silu", "tie_word_embeddings": True, "attention_bias": False, "attention_dropout": 0.0,
        "use_sliding_window": False, "sliding_window": None, "initializer_range": 0.02, "use_cache": True,
        "dtype": "bfloat16", "bos_token_id": None, "eos_token_id": end_ids[0], "pad_token_id": end_ids[1],
    }
    generation = {"eos_token_id": end_ids, "pad_token_id": end_ids[1], "do_sample": True, "temperature": 0.7,
                  "top_p": 0.9}
    for name, content in [("config.json", settings), ("generation_config.json", generation)]:
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def export(weights: dict[str, Tensor], config: ModelConfig, tokenizer: Tokenizer, out: Path) -> None:
    """Write the checkpoint; each file replaces its predecessor in one step."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:
        folder = Path(temporary)
        write_tokenizer(tokenizer, folder, config.max_position_embeddings)
        write_config(config, tokenizer, folder)
        stored = {name: weight.detach().bfloat16().contiguous() for name, weight in weights.items()}
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
        for path in sorted(folder.iterdir()):
            path.chmod(0o644)
            os.replace(path, out / path.name)
