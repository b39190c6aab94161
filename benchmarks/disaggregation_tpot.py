"""What running decodes gain from a split when long prompts come: `python -m benchmarks.disaggregation_tpot`.

One instance that prefills and one that decodes (`xllm cluster up --prefill 1 --decode 1`) against `--mixed` instances
that do both, with each chunk size (`max_num_batched_tokens`). Real processes, and HTTP to a real master. Decodes run
all the time; then a burst of long prompts comes. Compared is the TPOT p99 of the running decodes during the burst, with
the chunk size that has the least of those that keep 0.95 of the best one's throughput (tokens of prompts and answers
over the run, from before the burst until all of it is answered).

Without --real nothing is computed: steps sleep for what --device says (`role_instance.py`), and so do loads of KV and
its way to the other instance. With --real: the bundled model on this machine's CPUs; one mixed instance gets as many
threads as the other side has together.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from benchmarks.burst_figures import compared, figures
from benchmarks.burst_load import BurstLoad, measure
from benchmarks.priced_device import SHAPE, read_device
from serving.commands.bench import report
from serving.commands.bench.null_cluster import child_process
from serving.commands.bench.router_processes import write_model
from serving.commands.run_batch import ADDRESS
from xllm import env

GOAL = 0.5  # TPOT p99 of running decodes over that of the mixed side, at most; on timed null devices
CHUNKS = (64, 128, 256, 512, 1024, 2048)
SPLIT_CHUNK = 2048  # of the split's instances. Chosen: no decodes wait for prompts there
DEVICE = Path(__file__).parent / "devices" / "a100_qwen2.5_14b.json"
# Chosen: decodes of a chat's length on one device; prompts of documents, more of them than are computed in a second.
NULL_LOAD = BurstLoad(num_decodes=32, decode_prompt=1024, num_prompts=8, prompt_tokens=4096, answer_tokens=32,
                      settle_s=2.0, calm_s=2.0, longest=8192)
# Chosen: decodes that outlast the burst in the length that the bundled model has.
REAL_LOAD = BurstLoad(num_decodes=4, decode_prompt=64, num_prompts=8, prompt_tokens=1024, answer_tokens=16,
                      settle_s=0.5, calm_s=0.5, longest=2048)
KV_BLOCKS = 16384  # of each instance: all that is open, and what is cached of it


def main(argv: Sequence[str] | None = None) -> int:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0])
    parser.add_argument("--mixed", type=int, default=1, choices=(1, 2),
                        help="instances that the split is compared with")
    parser.add_argument("--chunks", default=",".join(map(str, CHUNKS)), help="sizes, with commas between")
    parser.add_argument("--real", action="store_true", help="the bundled model instead of timed null devices")
    parser.add_argument("--device", type=Path, default=DEVICE, help="what steps take (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="of the split; the median by TPOT p99 counts")
    parser.add_argument("--json", help="save the result here, too")
    arguments = parser.parse_args(argv)
    return report.ended(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> int:
    report.check(arguments.json)
    device = None if arguments.real else read_device(arguments.device)
    load = REAL_LOAD if arguments.real else NULL_LOAD
    with tempfile.TemporaryDirectory(prefix="xllm-tpot-") as name:
        bench = _Bench(Path(name), load, None if arguments.real else arguments.device)
        splits = sorted((bench.split() for _ in range(arguments.rounds)), key=lambda row: float(row["tpot_p99_ms"]))
        rows = [bench.mixed(arguments.mixed, int(chunk)) for chunk in arguments.chunks.split(",")]
    split = splits[len(splits) // 2]
    report.write({"against": f"{arguments.mixed} mixed", "split_instances": "1 prefill, 1 decode",
                  "same_hardware": arguments.mixed == 2 or arguments.real,
                  "device": "the bundled model on this machine" if device is None else device.what,
                  "load": {name: getattr(load, name) for name in load.__dataclass_fields__},
                  **compared(split, rows), "goal": GOAL if device is not None else None,
                  "split": split, "split_rounds_tpot_p99_ms": [row["tpot_p99_ms"] for row in splits], "mixed": rows},
                 arguments.json)
    return 0


class _Bench:
    """folder: for what processes read and write. device: file of what steps take; None: the bundled model."""

    def __init__(self, folder: Path, load: BurstLoad, device: Path | None):
        self._folder, self._load, self._device = folder, load, device
        self._num_runs = 0
        self._flags = ["--max-model-len", str(load.longest), "--max-num-seqs", str(load.num_decodes + load.num_prompts)]
        self._front: list[str] = []
        if device is not None:
            model, _ = write_model(folder / "model", **SHAPE)
            self._front = [str(model), "--load-format", "dummy"]
            self._flags += ["--device", "cpu", "--dtype", "float32", "--worker", "inline", "--no-async-scheduling",
                            "--num-kv-blocks", str(KV_BLOCKS)]

    def split(self) -> dict[str, Any]:
        """One run of a prefilling and a decoding instance."""
        flags = ["--max-num-batched-tokens", str(SPLIT_CHUNK), *self._threads(2)]
        return self._run(["--prefill", "1", "--decode", "1"], flags, 2)

    def mixed(self, num_instances: int, chunk_tokens: int) -> dict[str, Any]:
        """One run of instances that do both, each of which gets its share in turn."""
        flags = ["--max-num-batched-tokens", str(chunk_tokens), *self._threads(num_instances)]
        found = self._run(["--instances", str(num_instances), "--load-balance-policy", "RR"], flags, num_instances)
        return {"chunk_tokens": chunk_tokens, **found}

    def _threads(self, num_instances: int) -> list[str]:
        if self._device is not None:
            return []
        return ["--num-threads", str(max(1, (os.cpu_count() or 1) // num_instances))]

    def _run(self, places: list[str], flags: list[str], num_instances: int) -> dict[str, Any]:
        self._num_runs += 1
        report.note(" ".join([*places, *flags[:2]]))
        device = [] if self._device is None else ["--device", str(self._device)]
        command = ["benchmarks.owned_cluster", *device, *self._front, *places, "--port", "0", "--", *self._flags,
                   *flags]
        with _cluster(command, num_instances, self._folder / f"log-{self._num_runs}") as address:
            run = asyncio.run(measure(address, self._load))
            found = {**figures(run, self._load), "handed_over": _handed_over(address)}
        report.note(str(found))
        return found


@contextmanager
def _cluster(command: list[str], num_instances: int, log: Path) -> Iterator[str]:
    """A cluster whose instances have all joined; gives HOST:PORT of its master."""
    with child_process(command, env.for_child(), log) as cluster:
        url = cluster.said(lambda text: found[1] if "curl" in text and (found := ADDRESS.search(text)) else "")
        cluster.said(lambda text: url if text.count(" has joined") >= num_instances else "")
        yield url.removeprefix("http://")


def _handed_over(address: str) -> int:
    """Calls that have gone on at another instance than the one which computed their prompt."""
    for line in httpx.get(f"http://{address}/metrics", timeout=10.0).text.splitlines():
        if "cluster_handovers_total{" in line and 'outcome="moved"' in line:
            return int(float(line.rpartition(" ")[2]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
