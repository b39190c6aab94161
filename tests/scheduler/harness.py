"""Runs the real scheduler and step loop on `MemoryRunner`, and says what each request must return."""

from __future__ import annotations

import numpy as np

from backends.null import fixed_tokens
from tests.scheduler.memory_runner import LateExecutor, MemoryRunner
from xllm.config import EngineConfig
from xllm.engine.step_loop import StepLoop
from xllm.request import FinishReason, OutputDelta, Request, SamplingParams
from xllm.scheduler.scheduler import Scheduler

VOCAB = 50
EOS = 7
REQUEST_FIELDS = ("priority", "offline", "deadline_s", "cache_salt", "tenant", "tenant_weight")


def make_config(*, max_model_len: int = 96, block_size: int = 4, **settings) -> EngineConfig:
    settings = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "watermark": 0.0, **settings}
    return EngineConfig.from_flat(block_size=block_size, **settings).resolve(model_max_len=max_model_len,
                                                                            default_block_size=block_size)


class Simulation:
    """One engine over null hardware. `step()` audits everything after each step."""

    def __init__(self, num_blocks: int = 64, *, num_reserved_blocks: int = 0, **settings):
        self.config = make_config(**settings)
        self.scheduler = Scheduler(self.config, num_blocks=num_blocks, num_reserved_blocks=num_reserved_blocks,
                                   clock=lambda: 0.0)
        runner = MemoryRunner(self.config.scheduler.max_num_seqs, num_blocks, self.config.cache.block_size, VOCAB)
        depth = 1 if self.config.scheduler.async_scheduling else 0
        self.loop = StepLoop(self.scheduler, LateExecutor(runner, depth))
        self.outputs: dict[str, list[int]] = {}
        self.finished: dict[str, OutputDelta] = {}
        self.requests: dict[str, Request] = {}

    def add(self, name: str, prompt: list[int], *, eos: bool = False, **fields) -> None:
        request_fields = {k: fields.pop(k) for k in REQUEST_FIELDS if k in fields}
        sampling = SamplingParams(**{"max_tokens": 8, "seed": len(self.requests), **fields})
        request = Request(request_id=name, prompt_token_ids=prompt, sampling=sampling,
                          eos_token_ids=(EOS,) if eos else (), **request_fields)
        self.scheduler.add(request)
        self.requests[name] = request
        self.outputs[name] = []

    def step(self) -> list[OutputDelta]:
        deltas = self.loop.step()
        for delta in deltas:
            assert delta.request_id not in self.finished, "an output after the terminal one"
            self.outputs[delta.request_id] += delta.token_ids
            if delta.finish_reason is not None:
                self.finished[delta.request_id] = delta
        self.scheduler.check_integrity()
        return deltas

    def run(self, max_steps: int = 5000) -> None:
        for _ in range(max_steps):
            if not self.loop.has_work():
                return
            self.step()
        raise AssertionError("it never ends")

    def check_outputs(self) -> None:
        """Every finished request returned exactly what it must, whatever happened on the way."""
        for name, delta in self.finished.items():
            if delta.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
                assert (self.outputs[name], delta.finish_reason) == expected(self.requests[name], self.config), name
            else:
                full, _ = expected(self.requests[name], self.config)
                assert self.outputs[name] == full[: len(self.outputs[name])], name

    def check_idle(self) -> None:
        """Nothing is left behind."""
        assert not self.loop.has_work()
        assert self.scheduler.num_running == 0 and len(self.scheduler.waiting) == 0
        assert self.scheduler.kv.num_free_blocks == self.scheduler.kv.num_usable_blocks
        assert self.scheduler.rows.num_free == self.scheduler.rows.num_rows


def expected(request: Request, config: EngineConfig) -> tuple[list[int], FinishReason]:
    """What plain one-at-a-time generation gives."""
    params, num_prompt = request.sampling, len(request.prompt_token_ids)
    limit = config.model.max_model_len - num_prompt
    if params.max_tokens is not None:
        limit = min(limit, params.max_tokens)
    tokens: list[int] = []
    stops = set(params.stop_token_ids) | (set() if params.ignore_eos else set(request.eos_token_ids))
    while True:
        position = np.array([num_prompt + len(tokens)])
        tokens.append(int(fixed_tokens(np.array([params.seed], dtype=np.uint64), position, VOCAB)[0]))
        if tokens[-1] in stops and len(tokens) >= params.min_tokens:
            return tokens, FinishReason.STOP
        if len(tokens) >= limit:
            return tokens, FinishReason.LENGTH
