"""Section `smoke`: whether engines run here at all, before anything else takes time.

Twice, two engines at once in this process: in bfloat16, with pinned host memory, with one sequence and with 16, whose
steps are captured. Every token must be transformers' wherever that is sure of it. If this fails, nothing else runs.
"""

from __future__ import annotations

import random
from contextlib import ExitStack
from typing import Any

import torch

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.driver import Driver, tokens_of
from benchmarks.gpu.e2e import compare
from benchmarks.gpu.engine import graph_facts
from benchmarks.gpu.small_models import VOCAB, Truth, save

TURNS, ENGINES = 2, 2
SEQUENCES = (1, 16)
NUM_NEW = 12
SURE = 0.5  # how much likelier a token is, in log-probability, than bfloat16 is wrong by
HOST_BYTES = "16MiB"  # more than torch's own pool of pinned memory is asked for


def run(bench: Bench) -> None:
    folder = save("Qwen3", bench.scratch / "smoke", large=bench.device.is_cuda)
    truth = Truth(folder, bench.device.torch, stored_as=torch.bfloat16)
    for turn in range(TURNS):
        bench.attempt(f"smoke/{turn}", 1.0, _run_engines, bench, folder, truth, turn)


def _run_engines(bench: Bench, folder: Any, truth: Truth, turn: int) -> None:
    # What captures on a CPU is a check of the graphs' rules.
    graph_mode = "auto" if bench.device.is_cuda else "checked"
    with ExitStack() as stack:
        drivers = []
        for _ in range(ENGINES):
            drivers.append(Driver(folder, device=bench.device.kind, dtype="bfloat16", max_model_len=512,
                                  max_num_seqs=max(SEQUENCES), num_kv_blocks=96, graph_mode=graph_mode,
                                  host_cache_size=HOST_BYTES))  # fmt: skip
            stack.callback(drivers[-1].close)
        for number, driver in enumerate(drivers):
            _check_engine(bench, f"smoke/{turn}/engine {number}", driver, truth)
    drivers.clear()
    bench.device.release_memory()


def _check_engine(bench: Bench, id: str, driver: Driver, truth: Truth) -> None:
    rng, wrong, sure = random.Random(11), 0, 0
    for count in SEQUENCES:
        prompts = [[rng.randrange(VOCAB) for _ in range(rng.randint(3, 40))] for _ in range(count)]
        sent = {driver.add(prompt, NUM_NEW): prompt for prompt in prompts}
        found = driver.run()
        for request_id, prompt in sent.items():
            assert len(tokens_of(found[request_id])) == NUM_NEW, "tokens are missing"
            one = compare(truth, prompt, found[request_id], SURE)
            wrong, sure = wrong + one.wrong, sure + one.clear
    graphs = graph_facts(driver.core.stats()) or {}
    replays = sum(graphs.get("replays", {}).values())
    faults = ((f"{wrong} of {sure} sure tokens are others", wrong > 0),
              ("no token was sure enough to check", not sure),
              (f"graphs of {len(SEQUENCES)} sizes were to be captured", graphs.get("captures", 0) < len(SEQUENCES)),
              ("no graph was replayed", not replays))  # fmt: skip
    why = "; ".join(text for text, said in faults if said)
    bench.check(id, not why, why=why, places_ahead=sure, graphs=graphs)
