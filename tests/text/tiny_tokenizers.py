"""Small tokenizers of every kind that checkpoints use, trained on a handful of sentences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "The quick brown fox jumps over the lazy dog. The dog sleeps; the fox does not.",
    "def add(a, b):\n    return a + b\n",
    "naïve café, Zürich, Ærø, e\u0301cole",
    "机器学习很有趣。机器会学习。",
    "emoji 😀 👩‍👩‍👧 🇩🇪 done",
] * 3

TEMPLATE = (
    "{%- if tools %}{{ '<|im_start|>tools\\n' + (tools | tojson) + '<|im_end|>\\n' }}{% endif %}\n"
    "{%- for message in messages %}\n"
    "    {%- if message.role not in ['system', 'user', 'assistant', 'tool'] %}\n"
    "        {{- raise_exception('unknown role ' + message.role) }}\n"
    "    {%- endif %}\n"
    "    {%- if loop.index > 40 %}{% break %}{% endif %}\n"
    "    {{- '<|im_start|>' + message['role'] + '\\n' }}\n"
    "    {%- if message.name is defined %}{{ 'name: ' ~ message.name ~ '\\n' }}{% endif %}\n"
    "    {%- if message.reasoning_content %}{{ '<think>' + message.reasoning_content + '</think>' }}{% endif %}\n"
    "    {%- if message.content is string %}{{- message.content }}\n"
    "    {%- elif message.content %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}\n"
    "    {%- if message.tool_calls %}{{ message.tool_calls | tojson(indent=1) }}{% endif %}\n"
    "    {{- '<|im_end|>\\n' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}\n"
    "{%- if not enable_thinking | default(true) %}{{ bos_token }}{% generation %}off{% endgeneration %}{% endif %}"
)
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_level(folder: Path) -> None:
    """As Qwen and Llama 3: bytes as printable characters, special tokens in tokenizer.json."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=500, special_tokens=CHATML, initial_alphabet=alphabet, show_progress=False))
    write(folder, tokenizer, {"eos_token": "<|im_end|>", "bos_token": "<|endoftext|>", "chat_template": TEMPLATE})


def byte_level_bos(folder: Path) -> None:
    """As Llama 3: a post-processor puts bos in front; one token is known to tokenizer_config.json only."""
    byte_level(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.token_to_id("<|endoftext|>"))])
    late = {"content": "<|late|>", "lstrip": False, "rstrip": True, "normalized": False, "single_word": False,
            "special": True}
    write(folder, tokenizer, {
        "eos_token": {"__type": "AddedToken", **late, "content": "<|im_end|>", "rstrip": False},
        "bos_token": "<|endoftext|>",
        "pad_token": "<|pad|>",  # in no vocabulary yet
        "unk_token": "fox",  # an ordinary token until now
        "additional_special_tokens": ["<|extra|>"],
        "added_tokens_decoder": {str(tokenizer.get_vocab_size()): late},
        "chat_template": [{"name": "default", "template": TEMPLATE}, {"name": "tool_use", "template": "T" + TEMPLATE}],
    })


def sentencepiece_like(folder: Path) -> None:
    """As Llama 2 and Mistral: `▁` for blanks, <0xXX> for bytes that have no token."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    tokenizer.train_from_iterator([t for t in CORPUS if t.isascii()], trainers.BpeTrainer(
        vocab_size=480, special_tokens=special, show_progress=False))
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] in special[:3]]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B:1", special_tokens=[("<s>", 1)])
    write(folder, tokenizer, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})


def metaspace(folder: Path) -> None:
    """As newer sentencepiece conversions: the Metaspace decoder drops the first blank."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(CORPUS, trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False))
    write(folder, tokenizer, {"eos_token": "</s>", "unk_token": "<unk>"})


def wordpiece(folder: Path) -> None:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens([AddedToken("[UNK]", special=True)])
    tokenizer.train_from_iterator(CORPUS, trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=["[UNK]", "[SEP]"], show_progress=False))
    write(folder, tokenizer, {"eos_token": "[SEP]", "unk_token": "[UNK]"})


KINDS = {f.__name__: f for f in (byte_level, byte_level_bos, sentencepiece_like, metaspace, wordpiece)}


def write(folder: Path, tokenizer: Tokenizer, config: dict[str, Any]) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
