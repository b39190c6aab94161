"""`EngineLoop`: takes commands, runs steps and reports results, in the thread that owns an `EngineCore`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from xllm.engine.commands import (
    Abort,
    CacheChanges,
    Command,
    CommandReply,
    Control,
    Controlled,
    Depart,
    EngineState,
    Expect,
    Expected,
    Outputs,
    Refused,
    Shutdown,
    Submit,
    Unexpect,
)
from xllm.engine.gates import PauseMode
from xllm.engine.step_log import StepLog
from xllm.errors import EngineStateError, RequestError, WorkerError, XllmError
from xllm.kv.event_log import CacheEvents
from xllm.request import Request

if TYPE_CHECKING:
    from xllm.engine.core import EngineCore


class CommandSource(Protocol):
    """Where an engine's loop gets its commands."""

    def take(self, timeout_s: float | None) -> Command | None:
        """The next command, waiting up to `timeout_s` for it (None: without limit); None if none came."""


class EngineLoop:
    """report(answer): called in this thread with everything that goes out. on_busy(busy): called with True before the
    loop steps and with False before it waits, so that another thread can tell a hanging step from an idle engine.
    steps: records how long each step took. reports_cache: whether changes of the prefix cache are reported."""

    def __init__(self, core: EngineCore, source: CommandSource, report: Callable[[CommandReply], None], *,
                 on_busy: Callable[[bool], None] = lambda busy: None, steps: StepLog | None = None,
                 reports_cache: bool = False):
        self._core, self._source, self._report, self._on_busy = core, source, report, on_busy
        if reports_cache:
            core.cache_watch.listen(self._report_cache)
        self._steps = StepLog() if steps is None else steps
        core.take_admissions()  # from now on they are kept

    def run(self) -> None:
        """Run until `Shutdown` comes. Raises what a step raises; the core must not be used any more then."""
        while True:
            idle = not self._core.has_work()
            if idle:
                self._on_busy(False)
            if not self._obey(self._core.idle_s() if idle else 0.0):
                return
            if self._core.has_work():
                self._on_busy(True)
                self._step()
            elif idle:
                self._core.tick()

    def _obey(self, timeout_s: float | None) -> bool:
        """Carry out the commands that have come, waiting up to `timeout_s` for the first. Returns False after
        `Shutdown`."""
        command = self._source.take(timeout_s)
        while command is not None:
            if isinstance(command, Shutdown):
                return False
            if isinstance(command, Submit):
                self._report(self._submit(command.requests))
            elif isinstance(command, Abort):
                self._abort(command.request_ids)
            elif isinstance(command, Expect):
                self._report(self._expect(command))
            elif isinstance(command, Unexpect):
                self._core.unexpect(command.landing)
            elif isinstance(command, Depart):
                self._core.depart(command.request_id, command.offer)
            else:
                self._control(command)
            command = self._source.take(0.0)
        return True

    def _step(self) -> None:
        deltas = self._core.step()
        if (step := self._core.take_step()) is not None:
            self._steps.note(*step)
        admitted, staying = self._core.take_admissions(), self._core.take_staying()
        if deltas or admitted or staying:
            self._report(Outputs(deltas, admitted, staying=staying))

    def _report_cache(self, changes: list[CacheEvents]) -> None:
        for change in changes:
            self._report(CacheChanges(change.tier, b"".join(change.stored), b"".join(change.removed)))

    def _submit(self, requests: list[Request]) -> Outputs | Refused:
        for index, request in enumerate(requests):
            try:
                self._core.add(request)
            except RequestError as error:
                self._abort(request.request_id for request in requests[:index])
                self._unexpect(requests[index:])
                return Refused(requests[0].request_id, str(error), error.field)
        return Outputs(taken=[requests[0].request_id])

    def _expect(self, command: Expect) -> Expected:
        offer = self._core.expect(command.request, command.lease_s)
        if isinstance(offer, str):
            return Expected(command.number, reason=offer)
        return Expected(command.number, offer, offer.number)

    def _unexpect(self, requests: Sequence[Request]) -> None:
        """Free the room for the KV of requests that do not come."""
        for request in requests:
            if request.landing is not None:
                self._core.unexpect(request.landing)

    def _abort(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self._core.abort(request_id)

    def _control(self, command: Control) -> None:
        def answer(error: XllmError | None, num_blocks: int = 0) -> None:
            self._core.cache_watch.pass_on()
            self._report(self._controlled(command, error, num_blocks))

        try:
            if command.action == "load_adapter":  # answered when it has been read
                self._core.load_adapter(command.name, Path(command.folder), answer)
            else:
                answer(None, self._act(command))
        except XllmError as error:
            if isinstance(error, WorkerError) or getattr(error, "of_worker", False):
                raise  # there are no workers any more
            answer(error)

    def _act(self, command: Control) -> int:
        """Carry out a control command; returns how many cached KV blocks were dropped. Raises XllmError."""
        control = self._core.control
        if command.action == "pause":
            control.pause(PauseMode(command.mode))
        elif command.action == "resume":
            control.resume()
        elif command.action == "sleep":
            control.sleep(command.level)
        elif command.action == "wakeup":
            control.wake_up()
        elif command.action == "reset_prefix_cache":
            return control.reset_prefix_cache()
        elif command.action == "unload_adapter":
            self._core.unload_adapter(command.name)
        return 0

    def _controlled(self, command: Control, error: XllmError | None, num_blocks: int) -> Controlled:
        control = self._core.control
        state = EngineState(control.mode.value if control.mode else None, control.sleep_level, self._core.num_open,
                            self._core.adapters.names, self._core.adapters.digests)
        return Controlled(command.number, state, num_blocks, None if error is None else str(error),
                          getattr(error, "field", None), isinstance(error, EngineStateError))
