"""`node_facts`: what must be the same on all nodes of an engine: versions, settings, and the checkpoint's files."""

from __future__ import annotations

import dataclasses
import hashlib
import platform
from importlib.metadata import version
from pathlib import Path

from xllm.config import EngineConfig
from xllm.hub import resolve_model_path

# Settings that may differ: where a node finds its files and how many threads it computes with.
OF_A_NODE = frozenset({"model", "tokenizer", "generation_config", "lora_modules", "disk_cache_dir",
                       "disk_cache_key_file", "kv_store", "num_threads", "adaptive_threads"})
PACKAGES = ("xllm", "backends", "graph", "cuda_ops", "npu_ops")  # what a rank runs
CODE = (".py", ".c", ".cpp", ".h")
_HEADER_BYTES = 2**20  # that much of a file of weights is compared. Chosen: most headers are shorter


def node_facts(config: EngineConfig) -> dict[str, str]:
    """The facts by name. A model on the Hub is downloaded, if it is not here. Raises ModelError."""
    facts = {"the version of xLLM (a digest of its code)": _code(), "the version of torch": version("torch"),
             "the processor": platform.machine()}
    for group in dataclasses.fields(config):
        if group.name != "nodes":
            settings = dataclasses.asdict(getattr(config, group.name))
            facts |= {name: str(value) for name, value in settings.items() if name not in OF_A_NODE}
    folder = resolve_model_path(config.model.model, config.model.revision)
    tokenizer = folder if config.model.tokenizer is None else resolve_model_path(config.model.tokenizer)
    is_random = config.model.load_format == "dummy"
    weights = () if is_random else sorted(folder.glob("*.safetensors"))
    files = (folder / "config.json", tokenizer / "tokenizer.json")
    return facts | {f"file {path.name}": _digest(path, whole=True) for path in files if path.is_file()} | {
        f"file {path.name}": _digest(path, whole=False) for path in weights}


def _code() -> str:
    """Of the code that ranks run: two checkouts may have the same number of a version."""
    home, state = Path(__file__).resolve().parents[2], hashlib.blake2b(digest_size=8)
    for path in sorted(path for package in PACKAGES for path in (home / package).rglob("*") if path.suffix in CODE):
        state.update(str(path.relative_to(home)).encode() + path.read_bytes())
    return state.hexdigest()


def _digest(path: Path, *, whole: bool) -> str:
    """Of a small file all of it; of weights their size and their beginning, which has names, types and shapes."""
    with path.open("rb") as file:
        state = hashlib.blake2b(file.read() if whole else file.read(_HEADER_BYTES), digest_size=16)
    state.update(str(path.stat().st_size).encode())
    return state.hexdigest()
