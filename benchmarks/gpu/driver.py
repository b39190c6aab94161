"""`Driver`: this engine in this process, on random weights, stepped by hand."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.shapes import SHAPES, ModelShape
from xllm.config import EngineConfig
from xllm.engine.core import EngineCore
from xllm.request import OutputDelta, Request, SamplingParams

MEMORY_SHARE = 0.9  # of what weights leave, for KV


class Driver:
    """Token ids in, token ids out. What a request was asked for it always gets: end tokens do not count."""

    def __init__(self, folder: Path, **settings: Any):
        options = {"skip_tokenizer_init": True, **settings}
        self.core = EngineCore(EngineConfig.from_flat(model=str(folder), **options))
        self._num_requests = 0
        self.open: set[str] = set()

    def add(self, prompt: Sequence[int], max_tokens: int, *, lora: str = "", end: tuple[int, ...] = (),
            **sampling: Any) -> str:
        """Queue a request (greedy unless told otherwise), for an adapter if one is named; returns its id. end: its end
        tokens, if these are not ignored."""
        params = SamplingParams(**{"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True, **sampling})
        request_id = str(self._num_requests)
        self._num_requests += 1
        self.core.add(Request(request_id=request_id, prompt_token_ids=list(prompt), sampling=params,
                              arrival_s=time.monotonic(), lora=lora, eos_token_ids=end))
        self.open.add(request_id)
        return request_id

    def step(self) -> list[OutputDelta]:
        deltas = self.core.step()
        self.open -= {delta.request_id for delta in deltas if delta.finish_reason is not None}
        return deltas

    def run(self) -> dict[str, list[OutputDelta]]:
        """Step until nothing is open: the outputs by request."""
        outputs: dict[str, list[OutputDelta]] = {}
        while self.core.has_work():
            for delta in self.step():
                outputs.setdefault(delta.request_id, []).append(delta)
        return outputs

    def abort_all(self) -> None:
        for request_id in list(self.open):
            self.core.abort(request_id)
        self.run()
        assert not self.open, "a request has no terminal output"

    def close(self) -> None:
        self.core.shutdown()


def tokens_of(deltas: Sequence[OutputDelta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


@contextmanager
def measured_engine(bench: Bench, shape: ModelShape, tokens: int, **settings: Any) -> Iterator[Driver]:
    """An engine of a shape whose KV cache has room for `tokens`, or for what the device has memory for.

    Prefixes are not cached: repetitions would measure the cache.
    """
    device, block_size = bench.device, bench.device.backend.default_block_size
    device.release_memory()  # what the engine before left in cycles
    room = int((device.free_bytes() - 2 * shape.read_params * 2) * MEMORY_SHARE)
    itemsize = 2 if device.is_cuda else 4
    wanted = min(tokens // block_size, room // (shape.kv_bytes * itemsize // 2 * block_size))
    longest = min(shape.max_len, max(bench.profile.contexts + bench.profile.prefills) + 512)
    defaults: dict[str, Any] = {
        "device": device.kind, "load_format": "dummy", "max_model_len": longest, "enable_prefix_caching": False,
        "num_kv_blocks": max(wanted, -(-longest // block_size) + 1), "max_num_batched_tokens": 8192,
        "max_num_seqs": max(*bench.profile.batches, bench.profile.workload[0]),
    }  # fmt: skip
    driver = Driver(shape.write(bench.scratch / shape.name), **defaults | settings)
    try:
        yield driver
    finally:
        driver.close()
        del driver
        device.release_memory()


def shapes(bench: Bench) -> list[ModelShape]:
    return [SHAPES[name] for name in bench.profile.models]
