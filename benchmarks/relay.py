"""What it costs to put KV blocks into the order of another rank, beside numpy's copy of the same bytes, in turns.

Usage: python -m benchmarks.relay [--layers 64] [--blocks 128] [--rounds 9] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from backends.stored_field import NUMBER_BYTES, SCALE_BYTES, StoredPart, fields_of
from xllm.kv_layout import FieldLayout, KVLayout, LayerRun
from xllm.processor import processor_name
from xllm.transfer.relay import Relay

NUM_HEADS, HEAD_DIM = 8, 128  # of Llama 3 and Qwen3, from 8B on
CPU, CUDA, NPU = ("KHP", "KPH"), ("KPH", "KPH"), ("PKH", "PKH")  # axes of keys and of values


@dataclass(frozen=True)
class End:
    """One of the two engines."""

    block_size: int
    orders: tuple[str, str]
    num_ranks: int = 1
    format: str = "bf16"

    def layout(self, num_layers: int) -> KVLayout:
        """Of its first rank."""
        num_heads = NUM_HEADS // self.num_ranks
        parts = [StoredPart(num_heads, self.block_size, HEAD_DIM, order) for order in self.orders]
        fields = tuple(FieldLayout(offset=f.offset, head_stride=f.head_stride, position_stride=f.position_stride,
                                   number_stride=f.number_stride, width=f.width, item_bytes=f.item_bytes,
                                   num_heads=num_heads, total_heads=NUM_HEADS)
                       for f in fields_of(parts, self.format, is_quantised=False))
        position_bytes = HEAD_DIM * NUMBER_BYTES[self.format] + SCALE_BYTES.get(self.format, 0)
        run = LayerRun(num_layers=num_layers, fields=fields,
                       layer_bytes=2 * num_heads * self.block_size * position_bytes)
        return KVLayout(format=f"{self.format}.1", block_size=self.block_size, num_ranks=self.num_ranks, runs=(run,))


CASES = {
    "alike": (End(16, CUDA), End(16, CUDA)),
    "blocks of 16 to 32": (End(16, CUDA), End(32, CUDA)),
    "blocks of 16 to 128": (End(16, CUDA), End(128, CUDA)),
    "blocks of 32 to 16": (End(32, CUDA), End(16, CUDA)),
    "blocks of 128 to 16": (End(128, CUDA), End(16, CUDA)),
    "blocks of 16 to 32, CPU": (End(16, CPU), End(32, CPU)),
    "blocks of 32 to 16, CPU": (End(32, CPU), End(16, CPU)),
    "blocks of 16 to 32, int8": (End(16, CUDA, format="int8"), End(32, CUDA, format="int8")),
    "2 ranks to 1": (End(16, CUDA, 2), End(16, CUDA)),
    "1 rank to 2": (End(16, CUDA), End(16, CUDA, 2)),
    "CPU to CUDA": (End(16, CPU), End(16, CUDA)),
    "CUDA to CPU": (End(16, CUDA), End(16, CPU)),
    "CUDA to NPU, blocks of 16 to 128": (End(16, CUDA), End(128, NPU)),
}  # fmt: skip


def timed(act: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    act()
    return time.perf_counter() - began_s


def measure_one(source: End, target: End, num_layers: int, num_blocks: int, num_rounds: int) -> dict[str, float]:
    """num_blocks: of 16 positions. MB/s of what is sent, medians over the rounds, and pieces of one layer."""
    mine, theirs = source.layout(num_layers), target.layout(num_layers)
    relay, layer_bytes = Relay(mine, theirs), mine.runs[0].layer_bytes
    count = num_blocks * 16 // source.block_size
    layer_BX = np.random.default_rng(0).integers(0, 256, (count, layer_bytes), np.uint8)
    sent = relay.pieces(0, 0, layer_BX)
    sent_bytes = sum(len(piece.data) for piece in sent)
    like = np.zeros(sent_bytes, np.uint8)
    laid_s, copied_s = [], []
    for _ in range(num_rounds):
        laid_s.append(timed(lambda: [len(relay.pieces(layer, 0, layer_BX)) for layer in range(num_layers)]))
        copied_s.append(timed(lambda: [len(like.copy()) for _ in range(num_layers)]))
    rate, copy_rate = (sent_bytes * num_layers / 1e6 / statistics.median(times) for times in (laid_s, copied_s))
    return {"mb_per_s": round(rate), "copy_mb_per_s": round(copy_rate), "times_a_copy": round(copy_rate / rate, 2),
            "pieces_a_layer": len(sent)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=64)
    parser.add_argument("--blocks", type=int, default=128, help="of 16 positions")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="where the results go, too")
    options = parser.parse_args()
    found: dict[str, Any] = {name: measure_one(*case, options.layers, options.blocks, options.rounds)
                             for name, case in CASES.items()}
    text = json.dumps({"processor": processor_name(), "layers": options.layers, "blocks": options.blocks,
                       "rounds": options.rounds, "cases": found}, indent=1)  # fmt: skip
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
