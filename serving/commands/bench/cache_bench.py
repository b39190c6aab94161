"""`xllm bench cache`: prefix hit rates of a trace on the KV cache's own code.

A trace line is a JSON object with `hash_ids`: the request's blocks, equal ids for equal prefixes. They
are replayed as one-token blocks through `KVManager`, the very object that the engine uses. Where a line is
a whole session, sessions run side by side: all begin at once, and each keeps its own times.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from serving.commands.bench import report
from serving.commands.bench.optimum import optimum
from serving.commands.flags import FlagParser, parse_int
from xllm.config import EVICTION_POLICIES
from xllm.errors import ConfigError
from xllm.kv.eviction import EvictionPolicy, make_policy
from xllm.kv.manager import KVManager


def main(argv: list[str]) -> int:
    parser = FlagParser(prog="xllm bench cache", description=__doc__.splitlines()[0])
    parser.add_argument("--trace", type=Path, required=True, help="JSON lines with hash_ids")
    parser.add_argument("--capacities", type=_sizes, default="1000,3000,10000,30000", help="cache sizes in blocks")
    parser.add_argument("--policies", default=",".join(EVICTION_POLICIES), help="which ones, by name")
    parser.add_argument("--lru-k", type=parse_int, default=2, help="K of lru-k and the duel")
    parser.add_argument("--history", type=float, default=10.0, help="evicted blocks they remember, over the capacity")
    parser.add_argument("--l1-share", type=float, default=0.0, help="share of the blocks protected as tier L1")
    parser.add_argument("--no-optimum", action="store_true", help="leave out the best possible rate")
    parser.add_argument("--json", help="write the result to this file as well")
    parser.add_argument("--plot", help="write a picture of it to this PNG file")
    args = parser.parse_args(argv)
    report.check(args.json, args.trace)
    report.check(args.plot, args.trace)
    if args.plot and args.json and Path(args.plot).absolute() == Path(args.json).absolute():
        raise ConfigError(f"--json and --plot name the same file, {args.json}")
    policies = args.policies.split(",")
    if unknown := set(policies) - set(EVICTION_POLICIES):
        raise ConfigError(f"unknown policy {sorted(unknown)[0]!r}; known are {', '.join(EVICTION_POLICIES)}")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib: pip install 'xllm-engine[bench]'")
    requests = read_trace(args.trace)
    rates: dict[str, dict[str, float]] = {}
    for name in policies:
        rates[name] = {}
        for capacity in args.capacities:
            policy = make_policy(name, capacity, lru_k=args.lru_k, history=args.history, l1_share=args.l1_share)
            rates[name][str(capacity)] = round(100 * hit_rate(requests, capacity, policy), 2)
        report.note(f"{name:8}" + "".join(f"{rate:8.2f}" for rate in rates[name].values()))
    if not args.no_optimum:
        rates["opt"] = {str(c): round(100 * optimum(requests, c), 2) for c in args.capacities}
    result = {"trace": args.trace.name, "requests": len(requests), "blocks": sum(map(len, requests)),
              "different_blocks": len(np.unique(np.concatenate(requests))), "hit_rate_pct": rates,
              "lru_k": args.lru_k, "history": args.history, "l1_share": args.l1_share}
    if {"duel", "lru", "lru-k"} <= rates.keys():
        result["duel_behind_better_points"] = {
            c: round(max(rates["lru"][c], rates["lru-k"][c]) - rates["duel"][c], 2) for c in rates["duel"]}
    report.write(result, args.json)
    if args.plot:
        plot(args.trace.stem, rates, args.plot)
    return 0


def plot(title: str, rates: dict[str, dict[str, float]], path: str) -> None:
    """Hit rate over capacity, a line for each policy."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, by_capacity in rates.items():
        style = {"duel": ("-", 2.5), "opt": (":", 1.5)}.get(name, ("--", 1.2))
        axes.plot([int(c) for c in by_capacity], list(by_capacity.values()), style[0], linewidth=style[1], marker="o",
                  markersize=3, label=name)
    axes.set(xscale="log", xlabel="capacity, blocks", ylabel="block hit rate, %", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def _sizes(text: str) -> list[int]:
    sizes = [parse_int(word) for word in text.split(",")]
    if min(sizes) < 1:
        raise argparse.ArgumentTypeError("a cache has at least one block")
    return sizes


def read_trace(path: Path) -> list[np.ndarray]:
    """Each request's block ids, renumbered from 0: int32, in the order of service. ConfigError names a wrong line.

    A line is a request with `hash_ids`, or a session with `requests` whose ids are its own (and may nest further).
    """
    numbers: dict[object, int] = {}
    requests: list[tuple[float, np.ndarray]] = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                for start_s, ids in _requests_of(json.loads(line), number):
                    blocks = np.array([numbers.setdefault(i, len(numbers)) for i in ids], dtype=np.int32)
                    requests.append((start_s, blocks))
            except (ValueError, KeyError, TypeError):
                raise ConfigError(f"{path.name}, line {number}: not a JSON object with hash_ids") from None
    requests.sort(key=lambda request: request[0])  # stable: requests without a session stay in the file's order
    return [blocks for _, blocks in requests]


def _requests_of(entry: dict[str, Any], session: int) -> Iterator[tuple[float, list[object]]]:
    """(seconds from the session's start, ids); 0 seconds for a request that is no session's."""
    if "requests" not in entry:
        yield 0.0, list(entry["hash_ids"])
        return
    stack = [(0.0, request) for request in entry["requests"]]
    while stack:
        start_s, request = stack.pop(0)
        start_s += request.get("t", 0.0)
        if "hash_ids" in request:
            yield start_s, [(session, i) for i in request["hash_ids"]]
        stack += [(start_s, inner) for inner in request.get("requests", ())]


def hit_rate(requests: list[np.ndarray], num_blocks: int, policy: EvictionPolicy) -> float:
    """Share of the blocks that were found. Requests longer than the cache are cut to it."""
    kv = KVManager(num_blocks=num_blocks, block_size=1, num_rows=1, max_tokens_per_row=num_blocks, policy=policy)
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
