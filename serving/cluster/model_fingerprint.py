"""`model_fingerprint`: a digest by which a cluster tells whether two instances answer alike."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from xllm.config import ModelSettings
from xllm.engine.facts import EngineFacts

CONFIG_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "generation_config.json")
# Of a file of weights its size and so many pieces all over it are read. Chosen: other numbers are found wherever a
# training changed them, and the largest checkpoints take a second.
PIECES, PIECE_BYTES = 16, 64 << 10
# Settings that change what the same files answer.
SETTINGS = ("quantization", "hf_overrides", "rope_scaling", "allow_inexact_rope", "load_format")


def model_fingerprint(model: ModelSettings, facts: EngineFacts) -> str:
    """BLAKE2b-128, in hex, of the checkpoint's files and of the settings that change what it answers. It says nothing
    about where the files lie, when they were written, the device and its number formats."""
    said = {name: getattr(model, name) for name in SETTINGS} | {
        "max_model_len": facts.max_model_len, "eos_token_ids": facts.eos_token_ids, "vocab_size": facts.vocab_size}
    state = hashlib.blake2b(json.dumps(said, sort_keys=True).encode(), digest_size=16, person=b"xllm-cluster")
    folder = Path(facts.model_path)
    for name in CONFIG_FILES:
        if (path := folder / name).is_file():
            state.update(name.encode() + hashlib.blake2b(path.read_bytes()).digest())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        state.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            for piece in range(PIECES):
                file.seek(piece * size // PIECES)
                state.update(file.read(PIECE_BYTES))
    return state.hexdigest()
