"""An instance of a cluster whose engine computes nothing, for benchmarks of what is in front of engines: `python -m
serving.commands.bench.null_instance STEP_MS`.

Its gate, scheduler and KV cache are those of `xllm serve` with the bundled model, and so is what they report. A step
takes so many milliseconds and answers with fixed tokens (`xllm/runner/null_runner.py`); the engine is a thread of this
process. The cluster's secret is in XLLM_CLUSTER_SECRET. It prints the gate's HOST:PORT and ends when its stdin does.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from backends.null import NullTimes, VirtualClock
from serving.cluster.engine_gate import EngineGate
from serving.cluster.model_fingerprint import model_fingerprint
from xllm import env
from xllm.client.cluster_keys import cluster_keys
from xllm.client.gate_wire import ServedModel
from xllm.client.local import LocalClient
from xllm.config import EngineConfig
from xllm.engine.commands import CacheChanges
from xllm.engine.core import EngineCore
from xllm.engine.step_log import StepLog, StepReport, StepTiming
from xllm.errors import ConfigError
from xllm.kv.event_log import CacheEvents
from xllm.runner.null_runner import NullRunner

if TYPE_CHECKING:
    from xllm.runner.model_runner import ModelRunner

SETTINGS: dict[str, Any] = {"device": "cpu", "max_model_len": 1024, "max_num_seqs": 256, "num_kv_blocks": 8192,
                            "worker": "inline", "async_scheduling": False}
MODEL = "demo"
BEAT_S = 0.25  # between reports of steps. As an engine's process that is busy


class SleepingClock(VirtualClock):
    """Passes in real time: a step takes as long as it says."""

    def advance(self, seconds: float) -> None:
        super().advance(seconds)
        time.sleep(seconds)


class PacedRunner(NullRunner):
    """In a worker's place for a `ModelRunner`."""

    graphs = None


class NullCore(EngineCore):
    """An engine with the bundled model whose steps take `step_s` and compute nothing. timings: of its steps."""

    def __init__(self, step_s: float):
        from xllm.worker.inline import InlineLink  # imports torch

        super().__init__(EngineConfig.from_flat(**SETTINGS))
        assert isinstance(self.link, InlineLink), "the settings say so"
        runner = PacedRunner(self.config.scheduler.max_num_seqs, vocab_size=self.facts.vocab_size,
                             clock=SleepingClock(), cost=NullTimes(base_s=step_s))
        self.link.worker.runner = cast("ModelRunner", runner)
        self.timings = StepLog()

    def take_step(self) -> StepTiming | None:
        step = super().take_step()
        if step is not None:
            self.timings.note(*step)
        return step


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


async def serve(step_s: float, secret: bytes) -> None:
    """Until stdin ends."""
    core = NullCore(step_s)
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
    engine.shutdown()


def main(argv: list[str]) -> int:
    if (secret := env.cluster_secret()) is None:
        raise ConfigError("XLLM_CLUSTER_SECRET is not set")
    asyncio.run(serve(float(argv[0]) / 1000, secret))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
