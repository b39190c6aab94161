"""Engines on a shared store, for `test_shared_kv.py`: in its own process, and in children that are killed."""

from __future__ import annotations

from multiprocessing.connection import Connection
from pathlib import Path

from tests.llm.tier_child import BLOCK, FRESH, STORED, answer
from xllm import LLM

PROMPTS = STORED + FRESH


def make_shared(folder: Path | None, **settings: object) -> LLM:
    """Room on the device for a prompt or two; in host memory for all of them."""
    store = {} if folder is None else {"kv_store": str(folder), "kv_store_size": "32MiB"}
    return LLM(**{"device": "cpu", "dtype": "float32", "block_size": BLOCK, "num_kv_blocks": 20, "max_model_len": 256,
                  "max_num_seqs": 2, "num_threads": 1, "watermark": 0.0, "host_cache_size": "8MiB", **store,
                  **settings})


def settle(llm: LLM) -> None:
    """Let all moves end."""
    while len(llm._core.scheduler.kv.source.moves):
        llm._core.scheduler.promotions.wait(0.05)
        llm._core.tick()


def main(folder: str, first: int, last: int, told: Connection) -> None:
    """Answer the prompts first .. last, tell after each that it is stored, and wait to be killed."""
    llm = make_shared(Path(folder))
    for prompt in PROMPTS[first:last]:
        answer(llm, [prompt])
        settle(llm)
        told.send("stored")
    told.recv()
