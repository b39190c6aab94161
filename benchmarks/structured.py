"""What structured outputs cost on the host, as JSON. Usage: python -m benchmarks.structured [--vocabulary 151000]

Rows write random texts of a schema, a token a step. Per row and step, in microseconds: `masks`: taking the last token
in and computing the next mask, which the engine does beside the forward pass; `begin` and `collect`: what is left of
that in the step's own thread (`begin` hands the work to the masks' thread, `collect` takes a step's masks from it).
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

import xllm.bundled
from xllm.request import SamplingParams
from xllm.step import NewRow
from xllm.structured.matchers import RowMatchers
from xllm.structured.spec import StructuredOutput
from xllm.structured.store import GrammarStore
from xllm.structured.token_trie import VocabularySource, vocabulary_source
from xllm.text.tokenizer import Tokenizer, load_tokenizer

STEPS, WARM_UP = 60, 5
LETTERS = "abcdefghijklmnopqrstuvwxyzĠETAOIN0123456789\"{}:,._-"
PERSON = {
    "type": "object", "required": ["name", "age", "tags"], "additionalProperties": False,
    "properties": {"name": {"type": "string", "minLength": 10}, "age": {"type": "integer"},
                   "tags": {"type": "array", "items": {"type": "string"}, "minItems": 40}},
}
SPECS = {"json": StructuredOutput(json=PERSON), "regex": StructuredOutput(regex=r"([a-z]{1,8} ){200}")}


def large_tokenizer(num_tokens: int) -> Tokenizer:
    """Byte-level BPE with random merges: the size of a real one, though not its words."""
    chooser = random.Random(0)
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokens, merges = list(LETTERS), []
    while len(vocabulary) < num_tokens:
        pair = chooser.choice(tokens), chooser.choice(tokens)
        merged = "".join(pair)
        if len(merged) <= 14 and merged not in vocabulary:
            vocabulary[merged] = len(vocabulary)
            merges.append(pair)
            tokens.append(merged)
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|im_end|>", special=True)])
    return Tokenizer(backend, {"eos_token": "<|im_end|>"}, {})


class Rows:
    """Rows that write at random what their masks allow."""

    def __init__(self, store: GrammarStore, source: VocabularySource, num_rows: int, spec: StructuredOutput):
        self.tokens = SimpleNamespace(token_ids=np.zeros((num_rows, STEPS + 8), np.int32),
                                      num_tokens=np.ones(num_rows, np.int32),
                                      num_prompt_tokens=np.ones(num_rows, np.int32))
        self.matchers = RowMatchers(self.tokens, len(source.token_bytes))
        self.matchers.store = store
        self.slots = np.arange(num_rows, dtype=np.int32), np.zeros(num_rows, np.int64)
        self.rng = np.random.default_rng(0)
        eos = tuple(source.eos_token_ids)
        for row in range(num_rows):
            self.matchers.enter(NewRow(row=row, request_id="r", token_ids=self.tokens.token_ids[row, :1],
                                       num_prompt_tokens=1, num_computed_tokens=0, block_ids=np.zeros(0, np.int32),
                                       sampling=SamplingParams(structured=spec), eos_token_ids=eos, seed=0))
        store.prepare(spec).result()

    def draw(self, mask_XW: np.ndarray) -> None:
        for row, mask_W in enumerate(mask_XW):
            allowed = np.flatnonzero(np.unpackbits(mask_W.view(np.uint8), bitorder="little"))
            self.tokens.token_ids[row, self.tokens.num_tokens[row]] = self.rng.choice(allowed)
        self.tokens.num_tokens += 1


def measure(rows: Rows, *, beside: bool) -> tuple[list[float], list[float]]:
    """Seconds of each step in `begin` (which then gets all the time that it wants) and in `masks`."""
    begins, collects = [], []
    for _ in range(STEPS):
        start = time.perf_counter()
        if beside:
            rows.matchers.begin(*rows.slots)
        begins.append(time.perf_counter() - start)
        for filling in list(rows.matchers._begun.values()) if beside else ():
            assert filling.done is not None
            filling.done.result()
        start = time.perf_counter()
        masks = rows.matchers.masks(*rows.slots)
        collects.append(time.perf_counter() - start)
        assert masks is not None and not masks.failed
        rows.draw(masks.mask_XW)
    return begins[WARM_UP:], collects[WARM_UP:]


def per_row_us(seconds: list[float], num_rows: int) -> dict[str, float]:
    each = np.array(seconds) * 1e6 / num_rows
    return {"median": round(float(np.median(each)), 1), "mean": round(float(each.mean()), 1),
            "p99": round(float(np.quantile(each, 0.99)), 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocabulary", type=int, default=0, help="tokens of a random one; 0: the bundled model's")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64])
    args = parser.parse_args()
    bundled = Path(xllm.bundled.__file__).parent
    tokenizer = large_tokenizer(args.vocabulary) if args.vocabulary else load_tokenizer(bundled)
    source = vocabulary_source(tokenizer, tokenizer.vocab_size, ())
    store = GrammarStore(lambda: source)
    found = {}
    for name, spec in SPECS.items():
        for num_rows in args.rows:
            _, now = measure(Rows(store, source, num_rows, spec), beside=False)
            begins, collects = measure(Rows(store, source, num_rows, spec), beside=True)
            found[f"{name}, {num_rows} rows"] = {
                "masks_us": per_row_us(now, num_rows), "begin_us": per_row_us(begins, num_rows),
                "collect_us": per_row_us(collects, num_rows)}
    print(json.dumps({"vocabulary": tokenizer.vocab_size, "per_row_and_step": found}, indent=1))
    store.close()


if __name__ == "__main__":
    main()
