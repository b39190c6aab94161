"""How fast each transport fills the memory of another process, beside numpy's copy of the same bytes, in turns.

Usage: python -m benchmarks.transfer [--mb 64] [--rounds 15] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from xllm.processor import processor_name
from xllm.transfer.transport import Arrived, Peer
from xllm.transfer.transports import connect, open_window

PIECE_KB = (4, 16, 64)  # a layer's block: 16 positions of 2 to 32 heads' k and v, say
KEY = b"a key for one measurement alone."
NUMBER = 1


def receive(pipe: Connection, names: list[str], num_bytes: int, checksums: bool | None) -> None:
    """The other process: opens a window, and says when a put has arrived."""
    window = open_window(names, num_bytes, checksums=checksums)
    window.memory[:] = bytes(num_bytes)  # every page is there
    window.grant(NUMBER, KEY, [(0, num_bytes)], 3600.0)
    pipe.send(window.addresses)
    while True:
        for event in window.take(60.0):
            if not isinstance(event, Arrived):
                window.close()
                return
            pipe.send(time.monotonic())  # of the same machine, so the sender's clock


def pieces_of(source: np.ndarray, piece_bytes: int) -> list[tuple[int, memoryview]]:
    """In an order in which no two that follow each other touch, as blocks of a cache lie."""
    view = memoryview(source.data)
    starts = np.random.default_rng(0).permutation(len(source) // piece_bytes) * piece_bytes
    return [(int(start), view[start : start + piece_bytes]) for start in starts]


def put_once(peer: Peer, pipe: Connection, pieces: list[tuple[int, memoryview]]) -> tuple[float, float]:
    """Seconds until the source may be reused, and until the receiver has it."""
    began_s = time.monotonic()
    peer.put(NUMBER, KEY, pieces, b"")
    put_s = time.monotonic() - began_s
    return put_s, pipe.recv() - began_s


def copy_once(target: np.ndarray, source: np.ndarray) -> float:
    began_s = time.monotonic()
    np.copyto(target, source)
    return time.monotonic() - began_s


WAYS: dict[str, tuple[list[str], bool | None]] = {
    "shm": (["shm"], None), "tcp, checksums": (["tcp"], None), "tcp, no checksums": (["tcp"], False),
}


def measure(num_bytes: int, num_rounds: int) -> dict[str, Any]:
    """MB/s, medians over the rounds; each round does everything once."""
    source = np.random.default_rng(1).integers(0, 256, num_bytes, np.uint8)
    target = np.zeros(num_bytes, np.uint8)
    children, peers, pipes = [], {}, {}
    for way, (names, checksums) in WAYS.items():
        pipes[way], far = multiprocessing.get_context("spawn").Pipe()
        child = multiprocessing.get_context("spawn").Process(target=receive, args=(far, names, num_bytes, checksums),
                                                               daemon=True)
        child.start()
        children.append(child)
        peers[way] = connect(pipes[way].recv())
    cut = {kb: pieces_of(source, kb << 10) for kb in PIECE_KB}
    times: dict[tuple[str, int], list[float]] = {}
    for round_ in range(num_rounds + 1):  # the first is not counted
        for kb in PIECE_KB:
            found = {way: put_once(peers[way], pipes[way], cut[kb])[1] for way in WAYS}
            found["numpy copy"] = copy_once(target, source)
            for way, taken_s in found.items() if round_ else ():
                times.setdefault((way, kb), []).append(taken_s)
    for way, child in zip(WAYS, children, strict=True):
        peers[way].close()
        child.join()
    rates = {way: {f"{kb} KiB": round(num_bytes / 1e6 / statistics.median(times[way, kb])) for kb in PIECE_KB}
             for way in (*WAYS, "numpy copy")}
    shares = {way: {size: round(rate / rates["numpy copy"][size], 3) for size, rate in rates[way].items()}
              for way in WAYS}  # fmt: skip
    return {"processor": processor_name(), "put_bytes": num_bytes, "rounds": num_rounds, "mb_per_s": rates,
            "share_of_copy": shares}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mb", type=int, default=64, help="MiB of one put")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="where the results go, too")
    options = parser.parse_args()
    found = measure(options.mb << 20, options.rounds)
    print(json.dumps(found, indent=1))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
