"""A checkpoint like Llama 2's, whose greedy answers are known: `▁` for a blank, <0xXX> for bytes, and a decoder that
drops a text's first blank. See `scripted_model.py`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from tests.serving.scripted_model import write_model

SPECIAL = ("<unk>", "<s>", "</s>", "<sep>")
TEMPLATE = ("{{ bos_token }}{% for m in messages %}[INST] {{ m.content }} [/INST]"
            "{% endfor %}")


def write_checkpoint(folder: Path, chains: Sequence[Sequence[str]]) -> Path:
    """chains: tokens as they stand in the vocabulary; behind a chain's first the model says the others, and </s>."""
    words = [word for chain in chains for word in chain if word not in SPECIAL and not word.startswith("<0x")]
    names = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *sorted({char for word in words for char in word})]
    merges = []
    for word in words:
        for end in range(2, len(word) + 1):
            if word[:end] not in names:
                names.append(word[:end])
                merges.append((word[: end - 1], word[end - 1]))
    vocabulary = {name: index for index, name in enumerate(dict.fromkeys(names))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True,
                                     fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "LlamaTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "add_bos_token": True, "legacy": False, "chat_template": TEMPLATE}), encoding="utf-8")
    write_model(folder, len(vocabulary), [[*map(vocabulary.__getitem__, chain), 2] for chain in chains], 2)
    return folder
