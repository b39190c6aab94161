"""`Worker`: owns what a device holds, and carries out the engine's messages.

Each message is given to `receive` first, by the thread that takes messages in, and then, if `receive` says so, to
`perform`, by the thread that computes. Messages are performed in order; work that may go on beside the steps (reading
adapters, compiling grammars, moving KV between the tiers) begins in `receive` and has threads of its own.
"""

from __future__ import annotations

import gc
import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from xllm import env
from xllm.config import EngineConfig
from xllm.errors import ConfigError, DeviceError, DiskError, ModelError, XllmError
from xllm.kv.moves import Move
from xllm.parallel.seat import ALONE_SEAT, Seat
from xllm.runner.step_checker import StepChecker
from xllm.stats import ThreadStats
from xllm.step import ScheduleOutput, StepOutput
from xllm.structured.store import GrammarStore
from xllm.structured.token_trie import VocabularySource, vocabulary_source
from xllm.text.tokenizer import load_tokenizer
from xllm.worker.failures import as_failed
from xllm.worker.loading import LoadedModel
from xllm.worker.messages import (
    AdapterRead,
    Done,
    EndLanding,
    Foreground,
    GrammarDone,
    Load,
    Loaded,
    LoadProgress,
    PutAdapter,
    PutGrammar,
    ReadAdapter,
    Settle,
    Settled,
    Sleep,
    StepBegun,
    StopWorker,
    Wake,
    WorkerCommand,
    WorkerReport,
    WorkerStats,
    digest_drawn,
)
from xllm.worker.worker_tiers import WorkerTiers

if TYPE_CHECKING:
    from xllm.layers.adapter_slots import Adapter
    from xllm.runner.model_runner import ModelRunner, QueuedStep

logger = logging.getLogger(__name__)
# For patient moves between the KV tiers after each step (`kv/lanes.py:ride`), in seconds; at least one move runs.
# Chosen: well below a step's time, so that steps are hardly longer; docs/performance.md has the measured p99 of steps
# with it.
RIDE_S = 100e-6
# Errors whose message says all; others are logged with their traceback.
EXPECTED = (ConfigError, ModelError, DeviceError, DiskError)


class Worker:
    """The rank of `seat`, one of `num_ranks`. `report` is called from several threads; only rank 0 reports a step's
    results."""

    def __init__(self, report: Callable[[WorkerReport], None], *, num_ranks: int = 1,
                 seat: Seat = ALONE_SEAT):
        self._report, self._seat, self._rank = report, seat, seat.rank
        self._is_compared = num_ranks > 1 and env.check_integrity()
        self.model: LoadedModel | None = None
        self.runner: ModelRunner | None = None  # None: not loaded, or asleep
        self.grammars = GrammarStore(self._vocabulary_source)
        self._adapters: dict[int, Adapter] = {}  # read, and in no slot yet
        self._adapter_reader: ThreadPoolExecutor | None = None
        self._queued: deque[QueuedStep] = deque()  # steps whose results have not been read from the device
        self._checker: StepChecker | None = None
        self.tiers: WorkerTiers | None = None
        self._has_failed = False

    def receive(self, command: WorkerCommand) -> bool:
        """Begin the part of a command that need not wait for the steps before it; returns whether `perform` must be
        called too."""
        if isinstance(command, ScheduleOutput):
            assert self.runner is not None
            self.runner.prepare(command)
        elif isinstance(command, Move):
            assert self.tiers is not None
            self.tiers.send(command)
            return False
        elif isinstance(command, Foreground):
            assert self.tiers is not None
            self.tiers.lanes.set_foreground(command.steps_run)
            return False
        elif isinstance(command, EndLanding):
            assert self.tiers is not None and self.tiers.transfers is not None
            self.tiers.transfers.end_landing(command.number)
            return False
        elif isinstance(command, PutGrammar):
            self._put_grammar(command)
            return False
        elif isinstance(command, ReadAdapter):
            self._begin_reading(command)
            return False
        return True

    def perform(self, command: WorkerCommand) -> None:
        """Carry out a command and report the result. An error is reported too: as the command's answer if that has a
        place for one, else as the end of this worker. Nothing more is performed then but its end: a step begun after
        one that failed would be another than the other ranks', and its announcement would hide the error."""
        if self._has_failed and not isinstance(command, StopWorker):
            return
        try:
            if isinstance(command, ScheduleOutput):
                self._step(command)
            elif isinstance(command, Settle):
                self._settle(1)
            elif isinstance(command, PutAdapter):
                self._put_adapter(command)
            elif isinstance(command, Load):
                self._load(command.config)
            elif isinstance(command, (Sleep, Wake)):
                self._sleep_or_wake(command)
            elif isinstance(command, StopWorker):
                self._shut_down()
        except Exception as error:
            self._has_failed = True
            if not isinstance(error, EXPECTED):
                logger.exception("rank %d failed", self._rank)
            self._report(as_failed(error))

    # --- loading

    def _load(self, config: EngineConfig) -> None:
        self.model = model = LoadedModel(config, lambda name, share: self._report(LoadProgress(name, share)),
                                         self._seat)
        self._make_runner()
        if model.config.cache.has_host_tier:
            assert self.runner is not None
            self.tiers = WorkerTiers(model, self.runner, self._report, rank=self._rank)
        self._report(Loaded(config=model.config, model_path=str(model.path), vocab_size=model.model_config.vocab_size,
                            hidden_size=model.model_config.hidden_size,
                            eos_token_ids=tuple(model.model_config.eos_token_ids), num_blocks=model.num_blocks,
                            num_reserved_blocks=model.backend.num_reserved_blocks,
                            queues_steps=self.runner is not None and self.runner.feed is not None,
                            pooling=model.embedding.defaults, generates=model.generates,
                            tiers=None if self.tiers is None else self.tiers.facts, placement=model.placement))

    def _make_runner(self) -> None:
        assert self.model is not None
        self.runner = self.model.make_runner()
        self.runner.matchers.store = self.grammars
        has_own_heads = self.model.parallel.tp.size > 1
        if has_own_heads:
            self.runner.on_begin = lambda *begun: self._report(StepBegun(*begun))
        if self._is_compared:
            self._checker = StepChecker(self.runner.rows, None if has_own_heads else self.runner.kv_cache)

    def _sleep_or_wake(self, command: Sleep | Wake) -> None:
        error = None
        try:
            if isinstance(command, Sleep):
                self._free(keep_weights=command.keep_weights)
            elif self.runner is None:
                self._make_runner()
        except EXPECTED as failed:
            error = as_failed(failed)
        self._report(Done(type(command).__name__, error))

    def _free(self, *, keep_weights: bool) -> None:
        assert self.model is not None
        if self.runner is not None:
            self.runner.matchers.close()
        self.runner = self._checker = None
        gc.collect()
        self.model.free(keep_weights=keep_weights)

    def _shut_down(self) -> None:
        self.grammars.close()
        if self._adapter_reader is not None:
            self._adapter_reader.shutdown(wait=False, cancel_futures=True)
        if self.tiers is not None:
            self.tiers.close()
        if self.runner is not None:
            self.runner.matchers.close()
        if self.model is not None:
            self.model.leave()
        self._report(Done("Shutdown"))

    def stats(self) -> WorkerStats:
        """A snapshot; any thread may ask."""
        runner = self.runner
        graphs = None if runner is None else runner.graphs
        threads = None if self.model is None or not self.model.backend.computes_on_host else self.model.threads
        return WorkerStats(graphs=None if graphs is None else graphs.stats(),
                           threads=None if threads is None else ThreadStats(
                               num_threads=threads.num_threads, max_threads=threads.max_threads,
                               lowered_total=threads.lowered_total),
                           tier_misses={} if self.tiers is None else self.tiers.missed_total,
                           exchange_s=0.0 if self.model is None else self.model.parallel.tp.waiting_s)

    # --- steps

    def _step(self, plan: ScheduleOutput) -> None:
        assert self.runner is not None and self.model is not None, "a step for a worker that is not loaded"
        self.model.threads.step()
        started = self.runner.start(plan)
        if self._checker is not None:
            self._checker.note(plan, started if isinstance(started, StepOutput) else None)
        if isinstance(started, StepOutput):
            self._settle(len(self._queued))
            self._report_step(started)
        else:
            self._queued.append(started)
        if self.tiers is not None and self.tiers.lanes.num_riding:
            self.tiers.lanes.ride(RIDE_S)

    def _settle(self, count: int) -> None:
        """Read and report the oldest queued steps, at most `count`."""
        while count and self._queued:
            self._report_step(self._queued.popleft().finish())
            count -= 1

    def _report_step(self, output: StepOutput) -> None:
        if self._checker is not None:
            output = self._checker.checked(output)
        self._report(output if self._rank == 0 else Settled(output.step, output.check, digest_drawn(output)))

    # --- grammars and adapters

    def _put_grammar(self, command: PutGrammar) -> None:
        def done(built: object) -> None:
            if future.cancelled():  # the worker ends
                return
            error = future.exception()
            if error is None or isinstance(error, ValueError):  # RequestError and GrammarError are
                self._report(GrammarDone(command.spec, None if error is None else str(error)))
            else:
                self._report(as_failed(error))

        future = self.grammars.prepare(command.spec)
        future.add_done_callback(done)

    def _vocabulary_source(self) -> VocabularySource:
        from xllm.hub import resolve_model_path

        assert self.model is not None
        config, name = self.model.model_config, self.model.config.model.tokenizer
        tokenizer = load_tokenizer(resolve_model_path(name) if name else self.model.path)
        return vocabulary_source(tokenizer, config.vocab_size, config.eos_token_ids)

    def _begin_reading(self, command: ReadAdapter) -> None:
        if self._adapter_reader is None:
            self._adapter_reader = ThreadPoolExecutor(1, "xllm-adapter-reader")
        self._adapter_reader.submit(self._read_adapter, command)

    def _read_adapter(self, command: ReadAdapter) -> None:
        from xllm.models.adapter import read_adapter

        folder, digest, failed = Path(command.folder), "", None
        try:
            assert self.model is not None and self.model.adapters is not None
            adapter, digest = read_adapter(folder, self.model.adapters.shapes(), command.max_rank)
            self._adapters[command.number] = adapter
        except XllmError as error:
            failed = as_failed(error)
        except Exception as error:  # nothing of the engine has changed: no reason to end it
            logger.exception("reading the adapter in %s failed", folder)
            failed = as_failed(ModelError(f"{folder} cannot be read: {error}"))
        self._report(AdapterRead(command.number, digest, failed))

    def _put_adapter(self, command: PutAdapter) -> None:
        adapter = None if command.number is None else self._adapters.pop(command.number, None)
        if command.slot is not None:
            assert self.runner is not None
            self.runner.put_adapter(command.slot, adapter)
