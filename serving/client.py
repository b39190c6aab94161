"""`EngineClient`: the HTTP process's end of the engine, for asyncio.

It starts the engine process, hands requests down, and gives every caller the deltas of its own requests.
Every accepted request ends in exactly one way: a delta with a finish reason, or `EngineDeadError`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import zmq
import zmq.asyncio

from serving import protocol
from serving.engine_process import COMMAND_SOCKET, REPORT_SOCKET
from serving.security.caller import CALLER, num_prompt_tokens, sign
from serving.step_log import StepReport
from serving.stream import EngineBusyError, Stream
from serving.waiting import WaitingTokens
from xllm.config import EngineConfig
from xllm.errors import ConfigError, EngineDeadError, RequestError
from xllm.metrics import EngineStats
from xllm.request import OutputDelta, Request

MAX_UNIX_PATH = 100  # sun_path holds 108 bytes on Linux, 104 elsewhere
SHUTDOWN_TIMEOUT_S = 5.0
logger = logging.getLogger("xllm.client")


class EngineClient:
    """One engine process. Make it, `await start()`, use it, `await shutdown()`.

    `on_phase(name, share, seconds since start)` hears of the start-up as it goes on.
    """

    def __init__(self, config: EngineConfig, *, on_phase: Callable[[str, float, float], None] | None = None):
        self._config = config
        self._on_phase = on_phase or (lambda name, share, seconds: None)
        self.ready: protocol.Ready | None = None
        self.dead_reason: str | None = None
        self.dead_by_user_error = False
        self.restarting_after: str | None = None  # why the last process died, while another one starts
        self.phase = "start"
        self.stats = EngineStats()
        self.steps = StepReport()
        self.on_steps: Callable[[StepReport], None] = lambda steps: None  # each heartbeat's
        self._step_age_s: float | None = None
        self._heard_s = self._started_s = time.monotonic()
        self._streams: dict[str, Stream] = {}
        self.sleep_level = 0  # 0: awake
        self.adapters: tuple[str, ...] = ()  # names that requests may give as their model
        self._adapter_folders: dict[str, str] = {}  # of those that were loaded at run time
        self._numbers = itertools.count()
        self._answers: dict[int, asyncio.Future[protocol.Controlled]] = {}
        self.waiting = WaitingTokens(shed=self._shed)
        self._ready_event = asyncio.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._receiver: asyncio.Task[None] | None = None

    @property
    def is_up(self) -> bool:
        """Whether requests are taken."""
        return self.dead_reason is None and self._ready_event.is_set()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def num_open(self) -> int:
        return len(self._streams)

    def launch(self) -> None:
        """Start the process and begin to listen; returns at once. Call it inside the event loop."""
        self._folder = Path(tempfile.mkdtemp(prefix="xllm-"))  # mode 0700: nobody else can reach the sockets
        if len(str(self._folder / COMMAND_SOCKET)) > MAX_UNIX_PATH:
            self._folder.rmdir()
            self._folder = Path(tempfile.mkdtemp(prefix="xllm-", dir="/tmp"))
        self._context = zmq.asyncio.Context()
        self._commands = self._context.socket(zmq.PUSH)
        self._reports = self._context.socket(zmq.PULL)
        for socket, name in ((self._commands, COMMAND_SOCKET), (self._reports, REPORT_SOCKET)):
            socket.set_hwm(0)
            socket.setsockopt(zmq.LINGER, 0)
            socket.bind(f"ipc://{self._folder / name}")
        self._started_s = time.monotonic()
        # start_new_session: a Ctrl-C in the terminal is for the parent, which drains
        self._process = subprocess.Popen([sys.executable, "-m", "serving.engine_process", str(self._folder)],
                                         stdin=subprocess.PIPE, stdout=2, start_new_session=True)
        assert self._process.stdin is not None
        self._process.stdin.write(protocol.config_to_json(self._config) + b"\n")
        self._process.stdin.flush()
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._watch, args=(loop, self._process), name="engine-watch", daemon=True).start()
        self._receiver = asyncio.create_task(self._receive(), name="engine-reports")

    async def start(self) -> protocol.Ready:
        """Start the engine and wait until it is ready.

        Raises:
            ConfigError: a setting or the checkpoint is wrong. EngineDeadError: the engine failed.
        """
        if self._process is None:
            self.launch()
        await self._ready_event.wait()
        if self.dead_reason is not None:
            raise (ConfigError if self.dead_by_user_error else EngineDeadError)(self.dead_reason)
        assert self.ready is not None
        return self.ready

    async def restart(self, reason: str, pause_s: float = 0.0) -> protocol.Ready:
        """Start another process in place of one that died because of `reason`, after a pause. Until it is ready `ready`
        stays as it was, and requests are refused.

        Raises:
            ConfigError or EngineDeadError: the new one died while it started.
        """
        await self._bury()
        self.dead_reason, self.dead_by_user_error, self.restarting_after = None, False, reason
        self._ready_event.clear()
        await asyncio.sleep(pause_s)
        self.launch()
        await self._ready_event.wait()
        self.restarting_after = None
        if self.dead_reason is not None:
            raise (ConfigError if self.dead_by_user_error else EngineDeadError)(self.dead_reason)
        for name, folder in self._adapter_folders.items():
            await self.control("load_adapter", name=name, folder=folder)
        assert self.ready is not None
        return self.ready

    def end_process(self, reason: str) -> None:
        """End a process that does not move any more; open requests end with this reason."""
        if self._process is not None:
            self._process.kill()
        self._die(reason)

    def silent_for_s(self) -> float:
        """How long there has been no sign of progress; 0 while the engine idles and answers."""
        unheard = time.monotonic() - self._heard_s
        return unheard + self._step_age_s if self._step_age_s is not None else unheard

    async def submit(self, requests: Sequence[Request]) -> Stream:
        """Hand requests to the engine; returns when it has taken them all. The caller closes the stream.

        Raises:
            RequestError: one was refused; none of them runs. EngineDeadError: no engine.
        """
        self._check_up()
        for request in requests:
            if request.request_id in self._streams:
                raise RequestError(f"request_id {request.request_id!r} is in use", field="request_id")
        caller = CALLER.get()
        requests = sign(requests, caller)
        self.waiting.enter(requests)
        stream = Stream(self, requests)
        stream.on_tokens = caller.quota.charge_tokens
        self._streams.update((request.request_id, stream) for request in requests)
        try:
            self._send(protocol.Submit(requests))
            await stream.admitted()
        except BaseException:
            stream.close()
            raise
        caller.quota.charge_tokens(num_prompt_tokens(requests))
        return stream

    async def control(self, action: str, **options: Any) -> protocol.Controlled:
        """Do something to the engine as a whole (`protocol.Control`); returns what came of it.

        Raises:
            EngineDeadError: no engine, or it ended meanwhile.
        """
        self._check_up()
        number = next(self._numbers)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        try:
            self._send(protocol.Control(number, action, **options))
            done = await answer
            self.adapters, self.sleep_level = done.state.adapters, done.state.sleep_level
            if action == "load_adapter" and done.error is None:
                self._adapter_folders[options["name"]] = options["folder"]
            elif action == "unload_adapter" and done.error is None:
                self._adapter_folders.pop(options["name"], None)
            return done
        finally:
            del self._answers[number]

    def _check_up(self) -> None:
        if self.dead_reason is not None:
            raise EngineDeadError(self.dead_reason)
        if not self._ready_event.is_set():
            raise EngineDeadError(f"it is starting again after: {self.restarting_after or self.phase}")

    async def generate(self, request: Request) -> AsyncIterator[OutputDelta]:
        """The deltas of one request; leaving the loop early aborts it. Raises as `submit` does."""
        stream = await self.submit([request])
        try:
            while deltas := await stream.next():
                for delta in deltas:
                    yield delta
        finally:
            stream.close()

    def drop(self, stream: Stream, request_ids: Sequence[str]) -> None:
        """Abort requests and forget them."""
        self.waiting.leave_all(request_ids)
        for request_id in request_ids:
            stream.open_ids.discard(request_id)
            self._streams.pop(request_id, None)
        if self.dead_reason is None:
            self._send(protocol.Abort(list(request_ids)))

    def _shed(self, request_ids: Sequence[str]) -> None:
        """End requests that wait, to make room for better ones; their calls fail whole."""
        for request_id in request_ids:
            if (stream := self._streams.get(request_id)) is not None:
                stream.fail(EngineBusyError("the server is overloaded: this request gave its place in the queue to one "
                                            "that cannot wait"))

    def abort(self, request_id: str) -> None:
        """Abort a request; its reader gets its terminal delta from the engine. Unknown ids are ignored."""
        if request_id in self._streams and self.dead_reason is None:
            self._send(protocol.Abort([request_id]))

    def abort_calls(self, call_ids: Sequence[str] | None) -> int:
        """Abort all requests of these calls, or of all (None), and return how many that is; each reader gets its
        terminal delta."""
        wanted = None if call_ids is None else set(call_ids)
        found = [request_id for request_id in self._streams
                 if wanted is None or request_id in wanted or request_id.partition("/")[0] in wanted]
        if found and self.dead_reason is None:
            self._send(protocol.Abort(found))
        return len(found)

    def abort_all(self) -> None:
        if self._streams and self.dead_reason is None:
            self._send(protocol.Abort(list(self._streams)))

    async def shutdown(self) -> None:
        """Stop the process, by force if it does not answer, and remove the sockets. Idempotent."""
        if self._process is not None and self.dead_reason is None:
            self._send(protocol.Shutdown())
            await self._exited(self._process, SHUTDOWN_TIMEOUT_S if self._ready_event.is_set() else 0.0)
        await self._bury()

    async def _bury(self) -> None:
        """End the process by force if it has not ended, and remove the sockets."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            process.kill()
            await self._exited(process, SHUTDOWN_TIMEOUT_S)
        self._die("the engine was shut down")
        if self._receiver is not None:
            self._receiver.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._receiver
        if process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        self._context.destroy(linger=0)
        shutil.rmtree(self._folder, ignore_errors=True)

    def kill(self) -> None:
        """End the process this instant; for a second signal, when nothing may wait."""
        if self._process is not None:
            self._process.kill()
            shutil.rmtree(self._folder, ignore_errors=True)

    @staticmethod
    async def _exited(process: subprocess.Popen[bytes], timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        while process.poll() is None:
            if time.monotonic() >= deadline:
                return False
            await asyncio.sleep(0.02)
        return True

    def _send(self, command: protocol.Command) -> None:
        # A PUSH without a high-water mark takes every message at once, so the returned future is done.
        self._commands.send(protocol.encode(command))

    async def _receive(self) -> None:
        try:
            while True:
                frame = await self._reports.recv()
                self._heard_s = time.monotonic()
                self._handle(protocol.REPORTS.decode(frame))
        except Exception as error:  # a bug of ours; no reader may wait for what nobody hears
            logger.exception("reading the engine's reports failed")
            self._die(f"its reports cannot be read: {type(error).__name__}")

    def _handle(self, report: protocol.Report) -> None:
        if isinstance(report, protocol.Outputs):
            for request_id, at_s in report.admitted:
                if (stream := self._streams.get(request_id)) is not None:
                    stream.scheduled_s[request_id] = at_s
            for delta in report.deltas:
                self._deliver(delta)
        elif isinstance(report, protocol.Heartbeat):
            self.stats, self._step_age_s = report.stats, report.step_age_s
            self.steps = report.steps
            self.on_steps(report.steps)
        elif isinstance(report, protocol.Controlled):
            if (answer := self._answers.get(report.number)) is not None and not answer.done():
                answer.set_result(report)
        elif isinstance(report, protocol.Admissions):
            self._admit(report)
        elif isinstance(report, protocol.Phase):
            self.phase = report.name
            self._on_phase(report.name, report.share, time.monotonic() - self._started_s)
        elif isinstance(report, protocol.Ready):
            self.ready, self.phase, self.adapters, self.sleep_level = report, "ready", report.adapters, 0
            self._ready_event.set()
        else:
            self._die(report.reason, user_error=report.user_error)

    def _deliver(self, delta: OutputDelta) -> None:
        self.waiting.leave(delta.request_id)
        stream = self._streams.get(delta.request_id)
        if stream is None:
            return  # dropped by its reader while this was on its way
        if delta.finish_reason is not None:
            del self._streams[delta.request_id]
        stream.push(delta)

    def _admit(self, report: protocol.Admissions) -> None:
        for request_id in report.accepted:
            if (stream := self._streams.get(request_id)) is not None:
                stream.num_unanswered -= 1
                stream.wake()
        for rejection in report.rejected:
            self.waiting.leave(rejection.request_id)
            if (stream := self._streams.pop(rejection.request_id, None)) is not None:
                stream.open_ids.discard(rejection.request_id)
                stream.num_unanswered -= 1
                # Admission names the field of a wrong request; what names none is about the queue.
                kind = RequestError if rejection.field else EngineBusyError
                stream.rejection = kind(rejection.message, field=rejection.field)
                stream.wake()

    def _watch(self, loop: asyncio.AbstractEventLoop, process: subprocess.Popen[bytes]) -> None:
        code = process.wait()
        reason = f"the engine process was killed by signal {-code}" if code < 0 else f"it exited with code {code}"
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
            # Its own last words come first.
            loop.call_soon_threadsafe(lambda: loop.call_later(0.2, self._note_end, process, reason))

    def _note_end(self, process: subprocess.Popen[bytes], reason: str) -> None:
        if process is self._process:
            self._die(reason)

    def _die(self, reason: str, *, user_error: bool = False) -> None:
        """The first reason stands. Wakes every reader; each raises EngineDeadError."""
        if self.dead_reason is not None:
            return
        self.dead_reason, self.dead_by_user_error, self.phase = reason, user_error, "dead"
        if self._streams:
            logger.error("%d open requests end: %s", len(self._streams), reason)
        for stream in set(self._streams.values()):
            stream.wake()
        self.waiting.leave_all(list(self._streams))
        self._streams.clear()
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(EngineDeadError(reason))
        self._ready_event.set()
