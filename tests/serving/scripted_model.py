"""A checkpoint whose greedy answers are known: a real Llama whose next token depends on the last one alone.

Its attention and MLP add nothing, its embeddings are random, and the head maps every token of a script to the one
after it. Scripts are cut into tokens anywhere, inside of characters too. A prompt that ends with `go(name)` is
answered with the script of that name.
"""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from xllm.text.tokenizer import _ALPHABET

HIDDEN = 256
EOS = "<|end|>"
# What the model says where it may not follow its script: JSON that comes to its end. The ids are the bytes' own.
SECOND_CHOICES = {ord('"'): 2.0, ord("}"): 1.6, ord("]"): 1.5, ord(":"): 0.9, ord("{"): 0.8, ord("["): 0.7,
                  ord("0"): 0.4}
_CHAR_OF = {byte: char for char, byte in _ALPHABET.items()}


def go(name: str) -> str:
    """The token that a script follows on; for one called "...<think>" the prompt ends as if its template opened it."""
    return f"<|go:{name.removesuffix('<think>')}|>" + ("<think>" if name.endswith("<think>") else "")


def write_checkpoint(folder: Path, scripts: Mapping[str, str], template: str, special: tuple[str, ...] = ()) -> Path:
    """special: texts in the scripts that are special tokens; each may occur once in all of them."""
    rng = random.Random(7)
    used: set[bytes] = {bytes([byte]) for byte in range(256)}
    chains = {name: _pieces(text, special, used, rng) for name, text in scripts.items()}
    bare = [piece for chain in chains.values() for piece in chain if isinstance(piece, bytes)]
    vocabulary = {_CHAR_OF[byte]: byte for byte in range(256)}
    vocabulary |= {"".join(_CHAR_OF[byte] for byte in piece): 256 + n for n, piece in enumerate(bare)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    added = [EOS, *special, *map(go, scripts)]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in added])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", {"eos_token": EOS, "chat_template": template})
    ids = {name: [tokenizer.token_to_id(go(name)), *(_token_id(tokenizer, piece) for piece in chain),
                  tokenizer.token_to_id(EOS)] for name, chain in chains.items()}
    write_model(folder, tokenizer.get_vocab_size(), list(ids.values()), tokenizer.token_to_id(EOS))
    return folder


def _pieces(text: str, special: tuple[str, ...], used: set[bytes], rng: random.Random) -> list[bytes | str]:
    """The text in pieces, none of which has been used before."""
    pattern = "|".join(map(re.escape, special)) or r"(?!)"
    found: list[bytes | str] = []
    position = 0
    for match in [*re.finditer(pattern, text), None]:
        found += _cut(text[position: match.start() if match else len(text)].encode(), used, rng)
        if match:
            found.append(match[0])
            position = match.end()
    return found


def _cut(data: bytes, used: set[bytes], rng: random.Random) -> list[bytes]:
    pieces: list[bytes] = []
    while data:
        length = rng.randint(2, 6)
        while data[:length] in used and length <= len(data):
            length += 1
        piece, data = data[:length], data[length:]
        while piece in used:  # too short to be new: goes to the one before
            used.discard(pieces[-1])
            piece = pieces.pop() + piece
        used.add(piece)
        pieces.append(piece)
    return pieces


def _token_id(tokenizer: Tokenizer, piece: bytes | str) -> int:
    text = piece if isinstance(piece, str) else "".join(_CHAR_OF[byte] for byte in piece)
    found = tokenizer.token_to_id(text)
    assert found is not None
    return found


def write_model(folder: Path, vocab_size: int, chains: list[list[int]], eos: int) -> None:
    generator = torch.Generator().manual_seed(7)
    embeddings = torch.nn.functional.normalize(torch.randn(vocab_size, HIDDEN, generator=generator), dim=1)
    embeddings[:, 0] = 1  # of every token: what the second choices look at
    head = torch.zeros(vocab_size, HIDDEN)
    for chain in chains:
        for token, following in itertools.pairwise(chain):
            head[following, 1:] += 8 * embeddings[token, 1:]
    for byte, weight in SECOND_CHOICES.items():
        head[byte, 0] += weight
    layer = "model.layers.0."
    weights = {"model.embed_tokens.weight": embeddings, "lm_head.weight": head, "model.norm.weight": torch.ones(HIDDEN)}
    for name, shape in {"q_proj": (64, HIDDEN), "k_proj": (64, HIDDEN), "v_proj": (64, HIDDEN),
                        "o_proj": (HIDDEN, 64)}.items():
        weights[f"{layer}self_attn.{name}.weight"] = torch.zeros(shape)
    for name, shape in {"gate_proj": (64, HIDDEN), "up_proj": (64, HIDDEN), "down_proj": (HIDDEN, 64)}.items():
        weights[f"{layer}mlp.{name}.weight"] = torch.zeros(shape)
    for name in ("input_layernorm", "post_attention_layernorm"):
        weights[f"{layer}{name}.weight"] = torch.ones(HIDDEN)
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    _write_json(folder / "config.json", {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocab_size, "hidden_size": HIDDEN,
        "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
        "head_dim": 32, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "hidden_act": "silu", "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
        "dtype": "float32", "bos_token_id": None, "eos_token_id": eos})


def _write_json(file: Path, content: object) -> None:
    file.write_text(json.dumps(content), encoding="utf-8")
