"""An instance of a cluster whose engine computes nothing, for benchmarks of what is in front of engines: `python -m
serving.commands.bench.null_instance JSON`.

Its gate, scheduler, KV store and prefix cache are those of `xllm serve`, and so is what they report. A step takes as
long as `prices` say (`xllm/cost/cost_model.py:StepPrices`) and answers with fixed tokens
(`xllm/runner/null_runner.py`); the engine is a thread of this process. JSON: prices, and settings of the engine beside
`SETTINGS`, which may be left out. The cluster's secret is in XLLM_CLUSTER_SECRET.

It prints the gate's HOST:PORT, ends when its stdin does, and prints its totals then, as JSON: the scheduler's counters
(`xllm/stats.py:Counters`), computed_tokens and busy_s of all steps.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from serving.cluster.engine_gate import EngineGate
from serving.cluster.model_fingerprint import model_fingerprint
from xllm import env
from xllm.client.cluster_keys import cluster_keys
from xllm.client.gate_wire import ServedModel
from xllm.client.local import LocalClient
from xllm.config import EngineConfig
from xllm.cost.cost_model import StepPrices
from xllm.cost.observations import work_of
from xllm.engine.commands import CacheChanges
from xllm.engine.core import EngineCore
from xllm.engine.step_log import StepLog, StepReport, StepTiming
from xllm.errors import ConfigError
from xllm.kv.event_log import CacheEvents
from xllm.runner.null_runner import NullRunner
from xllm.stats import Counters
from xllm.step import ScheduleOutput, StepOutput

if TYPE_CHECKING:
    from xllm.runner.model_runner import ModelRunner

SETTINGS: dict[str, Any] = {"device": "cpu", "max_model_len": 1024, "max_num_seqs": 256, "num_kv_blocks": 8192,
                            "worker": "inline", "async_scheduling": False}
MODEL = "demo"
BEAT_S = 0.25  # between reports of steps. As an engine's process that is busy


class PacedRunner(NullRunner):
    """Takes the place of a loaded `ModelRunner` in its worker: a step takes as long as `prices` say, in real time, each
    layer an equal share of it. KV that other instances wait for is sent as it lies in the cache (nothing writes to it),
    a layer once its share is over; a layer waits for its KV that is being loaded."""

    graphs = None

    def __init__(self, num_rows: int, vocab_size: int, prices: StepPrices, loaded: ModelRunner):
        super().__init__(num_rows, vocab_size=vocab_size)
        self.matchers = loaded.matchers  # the worker closes them
        self._prices, self._board, self._departing = prices, loaded.board, loaded.departing
        self._num_layers = len(loaded.kv_cache.layers)
        self._computed_R = np.zeros(num_rows, dtype=np.int64)  # tokens whose KV is there

    def run(self, plan: ScheduleOutput) -> StepOutput:
        began_s = time.monotonic()
        output = super().run(plan)
        for new in plan.new_rows:
            self._computed_R[new.row] = new.num_computed_tokens
        work = work_of(plan.num_tokens_S, self._computed_R[plan.rows_S])
        self._computed_R[plan.rows_S] += plan.num_tokens_S
        step_s = self._prices.predict(work)
        if plan.tickets or plan.publish_ticket:
            self._by_layer(plan, began_s, step_s / self._num_layers)
        else:
            _sleep_until(began_s + step_s)
        return output

    def _by_layer(self, plan: ScheduleOutput, began_s: float, layer_s: float) -> None:
        loads, done_s = self._board.tickets(plan.tickets), began_s
        sent = self._departing[plan.publish_ticket] if plan.publish_ticket else None
        for layer in range(self._num_layers):
            if loads:
                for load in loads:
                    load.wait(layer)
                done_s = max(done_s, time.monotonic())
            done_s += layer_s
            _sleep_until(done_s)
            if sent is not None:
                sent.advance()
        if sent is not None:
            self._departing.close(sent)


def _sleep_until(end_s: float) -> None:
    time.sleep(max(0.0, end_s - time.monotonic()))


class NullCore(EngineCore):
    """An engine whose steps take what `prices` say and compute nothing. config: one whose worker is inline
    (`null_config`). timings: of its steps."""

    def __init__(self, prices: StepPrices, config: EngineConfig):
        from xllm.worker.inline import InlineLink  # imports torch

        super().__init__(config)
        assert isinstance(self.link, InlineLink), "the settings say so"
        loaded = self.link.worker.runner
        assert loaded is not None, "it has been loaded"
        runner = PacedRunner(self.config.scheduler.max_num_seqs, self.facts.vocab_size, prices, loaded)
        self.link.worker.runner = cast("ModelRunner", runner)
        self.timings = StepLog()

    def take_step(self) -> StepTiming | None:
        step = super().take_step()
        if step is not None:
            self.timings.note(*step)
        return step


def null_config(**settings: Any) -> EngineConfig:
    """Of a `NullCore`: `SETTINGS`, and these beside or instead."""
    return EngineConfig.from_flat(**SETTINGS | settings)


class NullEngine(LocalClient):
    """A `WatchedEngine` over a `NullCore`; `beat` it, so that its reports go out."""

    phase, restarting_after = "ready", None

    def __init__(self, core: NullCore):
        self.steps = StepReport()
        self.on_steps: Callable[[StepReport], None] = lambda steps: None
        self._timings = core.timings
        core.cache_watch.listen(self._report_cache)
        super().__init__(core)

    @property
    def is_up(self) -> bool:
        return self.dead_reason is None

    @property
    def engines(self) -> tuple[NullEngine, ...]:
        return (self,)

    def silent_for_s(self) -> float:
        return 0.0

    def beat(self) -> None:
        """Report the steps since the last call."""
        self.steps = self._timings.take()
        self.on_steps(self.steps)

    def _report_cache(self, changes: list[CacheEvents]) -> None:
        for change in changes:
            self._report(CacheChanges(change.tier, b"".join(change.stored), b"".join(change.removed)))


def totals(engine: NullEngine) -> dict[str, Any]:
    """What it prints at its end."""
    stats = engine.stats
    return {field.name: getattr(stats, field.name) for field in fields(Counters)} | {
        "computed_tokens": engine.steps.tokens.sum, "busy_s": engine.steps.time_s.sum}


async def serve(core: NullCore, secret: bytes) -> dict[str, Any]:
    """Until stdin ends; returns the totals."""
    engine = NullEngine(core)
    engine.bind()
    gate = EngineGate(engine, [engine], cluster_keys(secret))
    gate.listen("127.0.0.1:0")
    gate.open(ServedModel((MODEL,), model_fingerprint(core.config.model, core.facts)))
    print(gate.address, flush=True)
    ended = asyncio.create_task(asyncio.to_thread(sys.stdin.buffer.read))
    while not ended.done():
        await asyncio.wait([ended], timeout=BEAT_S)
        engine.beat()
    gate.close()
    found = totals(engine)
    engine.shutdown()
    return found


def main(argv: list[str]) -> int:
    if (secret := env.cluster_secret()) is None:
        raise ConfigError("XLLM_CLUSTER_SECRET is not set")
    told = json.loads(argv[0])
    core = NullCore(StepPrices(**told["prices"]), null_config(**told.get("settings", {})))
    print(json.dumps(asyncio.run(serve(core, secret))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
