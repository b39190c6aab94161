"""`xllm bench cache`: prefix hit rates of a trace on the KV cache's own code.

A trace line is a JSON object with `hash_ids`: the request's blocks, equal ids for equal prefixes. They
are replayed as one-token blocks through `KVManager`, the very object that the engine uses.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from tqdm import tqdm

from serving.bench import report
from serving.flags import FlagParser, parse_int
from xllm.errors import ConfigError
from xllm.kv.manager import KVManager


def main(argv: list[str]) -> int:
    parser = FlagParser(prog="xllm bench cache", description=__doc__.splitlines()[0])
    parser.add_argument("--trace", type=Path, required=True, help="JSON lines with hash_ids")
    parser.add_argument("--capacities", type=_sizes, default="1000,3000,10000,30000", help="cache sizes in blocks")
    parser.add_argument("--json", help="write the result to this file as well")
    args = parser.parse_args(argv)
    requests = read_trace(args.trace)
    rates = {str(c): round(100 * hit_rate(requests, c), 2) for c in args.capacities}
    report.write({"trace": args.trace.name, "requests": len(requests), "blocks": sum(map(len, requests)),
                  "hit_rate_pct": {"lru": rates}}, args.json)
    return 0


def _sizes(text: str) -> list[int]:
    sizes = [parse_int(word) for word in text.split(",")]
    if min(sizes) < 1:
        raise argparse.ArgumentTypeError("a cache has at least one block")
    return sizes


def read_trace(path: Path) -> list[np.ndarray]:
    """Each request's block ids, renumbered from 0: int32. Raises ConfigError that names the line."""
    numbers: dict[object, int] = {}
    requests = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                ids = json.loads(line)["hash_ids"]
            except (ValueError, KeyError, TypeError):
                raise ConfigError(f"{path.name}, line {number}: not a JSON object with hash_ids") from None
            requests.append(np.array([numbers.setdefault(i, len(numbers)) for i in ids], dtype=np.int32))
    return requests


def hit_rate(requests: list[np.ndarray], num_blocks: int) -> float:
    """Share of the blocks that were found. Requests longer than the cache are cut to it."""
    kv = KVManager(num_blocks=num_blocks, block_size=1, num_rows=1, max_tokens_per_row=num_blocks)
    row, hits, total = np.array([0]), 0, 0
    for blocks in tqdm(requests, desc=f"{num_blocks} blocks", unit="request", leave=False):
        total += len(blocks)
        kept = blocks[:num_blocks]
        # One more token, so that a request found whole counts as that.
        match = kv.lookup(np.append(kept, np.int32(-1)), "")
        hits += len(match.block_ids)
        kv.enter(0, match, 0)
        kv.grow(row, kv.blocks_needed(row, np.array([len(kept)])))
        kv.commit(0, kept, len(kept), -1)
        kv.leave(0, -1)
    return hits / total if total else 0.0
