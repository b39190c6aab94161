"""`xllm bench router --trace FILE --processes`: a trace on real instances, in real time.

Instances are processes with the real scheduler, KV store and prefix cache, and without a model (`null_instance.py`);
before them is a real `xllm master`, which this process sends completions over HTTP. What was cached and computed is
what the instances' own counters say, and when the first token came what the client sees.

A prompt's tokens follow from the names of its blocks in the trace; those behind its last whole block are its own.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from serving.commands.bench import report
from serving.commands.bench.http_load import ChatAnswer, HttpLoad
from serving.commands.bench.modelled_engine import EngineSpeed, TracedRequest
from serving.commands.bench.null_cluster import NullCluster, null_cluster
from serving.commands.bench.null_instance import MODEL
from serving.master_config import POLICY_OF
from xllm.cost.cost_file import read_cost_file
from xllm.cost.cost_model import StepPrices
from xllm.cost.fit import FEWEST_STEPS, fit
from xllm.errors import ConfigError, XllmError
from xllm.hub import resolve_model_path

KV_BLOCK = 16  # tokens: the CPU's own
FIRST_TOKEN = 16  # of those that prompts are made of. Chosen: behind the special ones
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
# Of a model that nobody computes: as little KV as there can be, so that the caches of a trace fit into memory.
TINY_SHAPE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1,
              "num_key_value_heads": 1, "head_dim": 16}
BYTES_A_TOKEN = 2  # of a sequence in hashes: the vocabulary is smaller than 2**16


def check_blocks(requests: Sequence[TracedRequest]) -> None:
    """Raises ConfigError for what instances cannot have as it is."""
    if requests[0].block_size % KV_BLOCK:
        raise ConfigError(f"--shrink must leave the trace's blocks whole blocks of {KV_BLOCK} tokens; it leaves "
                          f"{requests[0].block_size}")


def prices_of(speed: EngineSpeed) -> StepPrices:
    """What steps of a modelled instance cost."""
    return StepPrices(step=speed.step_s, token=speed.token_s, row=max(0.0, speed.sequence_s - speed.token_s))


def measured_prices(path: Path, speed_up: float, shrink: int) -> StepPrices:
    """Of a file of `xllm profile --json`, for a trace whose prompts are `shrink` times as short, and which is told
    `speed_up` times as fast with answers that much shorter. Raises ConfigError."""
    prices = fit(read_cost_file(path).profile).steps
    if prices is None:
        raise ConfigError(f"--cost-profile: {path} has fewer than {FEWEST_STEPS} steps")
    read = prices.read * shrink * shrink / speed_up  # of a prompt's tokens, each over all before it
    return StepPrices(step=prices.step, token=prices.token * shrink / speed_up, row=prices.row, read=read,
                      decode_read=max(0.0, (prices.read + prices.decode_read) * shrink - read))


def replay(requests: Sequence[TracedRequest], policy: str, num_instances: int, num_tokens: int,
           prices: StepPrices) -> dict[str, Any]:
    """What comes of a trace. num_tokens: of each instance's KV cache. Raises XllmError if the cluster does not start or
    no request is answered."""
    with tempfile.TemporaryDirectory(prefix="xllm-bench-") as name:
        folder = Path(name)
        model, vocab_size = write_model(folder / "model")
        longest = max(request.num_tokens + request.num_output_tokens for request in requests)
        instance = json.dumps({"prices": prices._asdict(), "settings": {
            "model": str(model), "load_format": "dummy", "max_model_len": longest + 1,
            "num_kv_blocks": num_tokens // KV_BLOCK}})
        flags = ["--load-balance-policy", next(flag for flag, known in POLICY_OF.items() if known == policy)]
        with null_cluster(instance, num_instances, flags, folder) as cluster:
            began_s = time.monotonic()
            answers = asyncio.run(HttpLoad(cluster.address).ask_in_time("/v1/completions",
                                                                        _bodies(requests, vocab_size)))
            took_s = time.monotonic() - began_s
            routed = _routed(cluster)
        return {**summary(requests, answers, cluster.totals, took_s), **routed}


def write_model(folder: Path, **config_members: int) -> tuple[Path, int]:
    """The folder of a tiny model without weights, with the bundled one's tokenizer; and the size of its vocabulary.
    config_members: of its config.json, beside or instead of `TINY_SHAPE`."""
    bundled = resolve_model_path(None)
    config = json.loads((bundled / "config.json").read_text(encoding="utf-8"))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | TINY_SHAPE | {"max_position_embeddings": 2**20}
                                                   | config_members))
    for name in TOKENIZER_FILES:
        shutil.copy(bundled / name, folder / name)
    assert config["vocab_size"] <= 2 ** (8 * BYTES_A_TOKEN)
    return folder, int(config["vocab_size"])


def prompt_of(request: TracedRequest, vocab_size: int) -> list[int]:
    """Its token ids. The names of equal blocks are equal, and so are their tokens."""
    names = [*request.blocks, hashlib.blake2b(request.request_id.encode()).digest()]
    drawn = b"".join(hashlib.shake_128(name).digest(BYTES_A_TOKEN * request.block_size) for name in names)
    token_ids = np.frombuffer(drawn, dtype="<u2")[: request.num_tokens].astype(np.int64)
    return (FIRST_TOKEN + token_ids % (vocab_size - FIRST_TOKEN)).tolist()


def _bodies(requests: Sequence[TracedRequest], vocab_size: int) -> Iterator[tuple[float, dict[str, Any]]]:
    for request in requests:
        yield request.at_s - requests[0].at_s, {
            "model": MODEL, "prompt": prompt_of(request, vocab_size), "max_tokens": request.num_output_tokens,
            "ignore_eos": True, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}


def _routed(cluster: NullCluster) -> dict[str, Any]:
    """Why the master sent requests where it did, and which it sent again because an instance was lost or had no
    room."""
    with urllib.request.urlopen(f"http://{cluster.address}/cluster") as answer:
        found = json.load(answer)["totals"]
    return {"reasons": dict(sorted(found["decisions"].items())), "went_on_elsewhere": sum(found["recovered"].values()),
            "retried": found["retried"]}


def summary(requests: Sequence[TracedRequest], answers: Sequence[ChatAnswer | str], totals: list[dict[str, Any]],
            took_s: float) -> dict[str, Any]:
    """Of requests and their answers, and of the instances' totals. failed: also those whose answer is not as long as
    was asked for. Raises XllmError if there is no answer."""
    good = [answer for answer in answers if isinstance(answer, ChatAnswer)]
    errors = sorted({answer for answer in answers if isinstance(answer, str)})
    if not good:
        raise XllmError(f"no request was answered: {errors[0]}")
    wrong = sum(not isinstance(answer, ChatAnswer) or answer.num_tokens != request.num_output_tokens
                or answer.num_prompt_tokens != request.num_tokens for request, answer in zip(requests, answers))
    prompt = [one["prompt_tokens_total"] for one in totals]
    computed = [one["prompt_tokens_total"] - one["cached_prompt_tokens_total"] for one in totals]
    ttft_s = report.quantiles([answer.first_s for answer in good])
    return {"hit_rate_pct": round(100 * (1 - sum(computed) / sum(prompt)), 2),
            "ttft_p50_s": round(ttft_s["p50"], 3), "ttft_p99_s": round(ttft_s["p99"], 3),
            "imbalance": round(max(computed) / (sum(computed) / len(computed)), 3),
            "failed": wrong, "errors": errors[:5], "seconds": round(took_s, 1),
            "computed_by_instance": computed, "preemptions": sum(one["preemptions_total"] for one in totals),
            "busy_pct": round(100 * sum(one["busy_s"] for one in totals) / len(totals) / took_s, 1)}
