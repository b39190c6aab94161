"""`xllm bench kv-dtype`: what KV in fewer bits costs, in bits per byte of held-out text.

A window of text is a prefix and its continuation. The prefix is computed, its KV blocks go to the store's format and
back, as if they had been in host memory or on disk, and the continuation is scored over them. Or all KV is of that
format on the device, from the first token on ("device int8", "device fp8"). The texts are files of Python's standard
library that the bundled model was not trained on.
"""

from __future__ import annotations

import hashlib
import math
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from serving.commands.bench import report
from serving.commands.flags import FlagParser
from xllm.errors import ConfigError

FORMATS = ("fp32", "bf16", "fp16", "int8", "fp8")
ON_DEVICE = ("int8", "fp8")
ROWS = (*FORMATS, *(f"device {name}" for name in ON_DEVICE))
# Which files the bundled model was trained on: tools/train_demo/corpus.py.
HELD_OUT_MODULUS = 32
SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__",
                   "lib-dynload"}


@dataclass(frozen=True)
class TextWindow:
    """Token ids, and the bytes of text that those behind the prefix stand for."""

    token_ids: list[int]
    num_bytes: int


def main(argv: list[str]) -> int:
    from tqdm import tqdm

    from xllm.hub import resolve_model_path

    parser = FlagParser(prog="xllm bench kv-dtype", description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="local folder or Hub id; none: the bundled model")
    parser.add_argument("--prefix", type=int, default=512, help="tokens whose KV is stored; a multiple of 16")
    parser.add_argument("--continuation", type=int, default=512, help="tokens that are scored, at most")
    parser.add_argument("--windows", type=int, help="how many windows of text; none: all")
    parser.add_argument("--json", help="write the result to this file as well")
    args = parser.parse_args(argv)
    report.check(args.json, args.model)
    for name in ("prefix", "continuation"):
        if getattr(args, name) < 1:
            raise ConfigError(f"{name} must be at least 1, got {getattr(args, name)}")
    path = resolve_model_path(args.model)
    found = list(windows(path, held_out_texts(), args.prefix, args.continuation))[: args.windows]
    scorer = Scorer(path, args.prefix, args.continuation)
    nats = np.array([scorer.nats(window.token_ids) for window in tqdm(found, desc="windows")])
    report.write(summary(found, nats, scorer, args.prefix), args.json)
    return 0


def is_held_out(relative_path: str) -> bool:
    """Whether the bundled model was not trained on that file of the standard library."""
    return int.from_bytes(hashlib.sha256(relative_path.encode()).digest()[:4], "big") % HELD_OUT_MODULUS == 0


def held_out_texts() -> Iterator[str]:
    """The held-out files in sorted order; tests, caches and installed packages are none of them."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        skipped = SKIPPED_FOLDERS.intersection(relative.parts) or relative.parts[0].startswith("config-")
        if not skipped and is_held_out(relative.as_posix()):
            yield path.read_bytes().decode("utf-8", errors="ignore")


def windows(path: Path, texts: Iterator[str], prefix: int, continuation: int) -> Iterator[TextWindow]:
    """Cut texts such that every token behind the first `prefix` ones of its text is scored once."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    for text in texts:
        encoding = tokenizer.encode(text, add_special_tokens=False)
        ids, ends = encoding.ids, [end for _, end in encoding.offsets]
        for start in range(0, len(ids) - prefix, continuation):
            stop = min(start + prefix + continuation, len(ids))
            scored = text[ends[start + prefix - 1] : ends[stop - 1]]
            yield TextWindow(ids[start:stop], len(scored.encode()))


class Scorer:
    """A model with a KV cache for one window, and a codec for each format."""

    def __init__(self, path: Path, prefix: int, continuation: int):
        import torch

        from backends import get_backend
        from backends.reference.kv_codes import QUANTISED
        from xllm import env
        from xllm.models.loader import load_model
        from xllm.runner.kv_cache import KVCache
        from xllm.runner.kv_codec import KVCodec

        self._backend = get_backend("cpu", cache_dir=env.cache_dir())
        block_size = self._backend.default_block_size
        if prefix % block_size:
            raise ConfigError(f"prefix must be a multiple of {block_size}, got {prefix}")
        length = prefix + continuation
        self._model = load_model(path, backend=self._backend, dtype=torch.float32, max_model_len=length)
        num_blocks = -(-length // block_size)
        self._cache, *quantised = (
            KVCache(self._backend, self._model.kv_specs, num_blocks=num_blocks, block_size=block_size, dtype=dtype)
            for dtype in (torch.float32, *QUANTISED))
        self._on_device = dict(zip(QUANTISED.values(), quantised))
        self._prefix, self._block_size = prefix, block_size
        self._blocks = torch.arange(prefix // block_size)
        self.codecs = {name: KVCodec.for_cache(name, self._cache.layers, self._backend.ops) for name in FORMATS}
        self._stored = {name: torch.empty(len(self._blocks), codec.payload_bytes, dtype=torch.uint8)
                        for name, codec in self.codecs.items()}

    def nats(self, token_ids: list[int]) -> list[float]:
        """The cost of the tokens behind the prefix, by row of the table (`ROWS`)."""
        import torch

        with torch.inference_mode():
            hidden_TD = self._forward(token_ids, 0, self._prefix, self._cache)
            first = self._nats(hidden_TD[-1:], token_ids[self._prefix : self._prefix + 1])
            self._store("fp32")
            found = [first + self._continue(token_ids, name) for name in FORMATS]
            return found + [self._all_on_device(token_ids, name) for name in ON_DEVICE]

    def _all_on_device(self, token_ids: list[int], name: str) -> float:
        cache = self._on_device[name]
        before_TD = self._forward(token_ids, 0, self._prefix, cache)
        behind_TD = self._forward(token_ids, self._prefix, len(token_ids), cache)
        first = self._nats(before_TD[-1:], token_ids[self._prefix : self._prefix + 1])
        return first + self._nats(behind_TD[:-1], token_ids[self._prefix + 1 :])

    def _continue(self, token_ids: list[int], name: str) -> float:
        self._load("fp32")  # as it was computed
        self._store(name)
        self._load(name)
        hidden_TD = self._forward(token_ids, self._prefix, len(token_ids), self._cache)
        return self._nats(hidden_TD[:-1], token_ids[self._prefix + 1 :])

    def _store(self, name: str) -> None:
        for layer, caches in enumerate(self._cache.layers):
            self.codecs[name].export_layer(self._backend.ops, caches, self._blocks, self._stored[name],
                                           self._blocks, layer)

    def _load(self, name: str) -> None:
        for layer, caches in enumerate(self._cache.layers):
            self.codecs[name].import_layer(self._backend.ops, caches, self._blocks, self._stored[name],
                                           self._blocks, layer)

    def _forward(self, token_ids: list[int], start: int, stop: int, cache: Any) -> Any:
        """Hidden states of the tokens from `start` to `stop`; position p lies in slot p."""
        import torch

        from backends.metadata import AttentionMetadata

        positions_T = torch.arange(start, stop, dtype=torch.int32)
        count = stop - start
        table_SM = torch.arange(-(-stop // self._block_size), dtype=torch.int32)[None]
        meta = AttentionMetadata(
            query_start_S1=torch.tensor([0, count], dtype=torch.int32), max_query_len=count, num_tokens=count,
            seq_lens_S=torch.tensor([stop], dtype=torch.int32), block_table_SM=table_SM, slot_mapping_T=positions_T,
            max_seq_len=stop, block_size=self._block_size)
        meta.plan = self._model.plan(meta)
        ids_T = torch.tensor(token_ids[start:stop], dtype=torch.int32)
        return self._model.forward(ids_T, positions_T, cache.layers, meta)

    def _nats(self, hidden_TD: Any, targets: list[int]) -> float:
        import torch

        logits_TV = self._model.compute_logits(hidden_TD)
        return torch.nn.functional.cross_entropy(logits_TV, torch.tensor(targets), reduction="sum").item()


def summary(found: list[TextWindow], nats_WF: np.ndarray, scorer: Scorer, prefix: int) -> dict[str, Any]:
    """Bits per byte and perplexity per token by format, and their differences to fp32."""
    num_bytes = sum(window.num_bytes for window in found)
    num_tokens = sum(len(window.token_ids) for window in found) - prefix * len(found)
    total = dict(zip(ROWS, nats_WF.sum(axis=0).tolist()))
    perplexity = {name: math.exp(nats / num_tokens) for name, nats in total.items()}
    return {
        "bits_per_byte": {name: nats / math.log(2) / num_bytes for name, nats in total.items()},
        "bits_per_byte_more_pct": {name: (nats / total["fp32"] - 1) * 100 for name, nats in total.items()},
        "perplexity": perplexity,
        "perplexity_more_pct": {name: (value / perplexity["fp32"] - 1) * 100 for name, value in perplexity.items()},
        "payload_bytes": {name: codec.payload_bytes for name, codec in scorer.codecs.items()},
        "windows": len(found), "prefix_tokens": prefix, "scored_tokens": num_tokens, "scored_bytes": num_bytes,
    }
