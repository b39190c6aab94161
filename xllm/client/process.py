"""`ProcessClient`: a client that runs its engine in a process of its own, and can start it again."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import zmq
import zmq.asyncio

from xllm import env
from xllm.child_end import ChildEnd
from xllm.child_process import run_module, socket_folder
from xllm.client.command_codec import COMMANDS, REPORTS, config_to_json
from xllm.client.commanding import CommandingClient
from xllm.client.engine_process import COMMAND_SOCKET, REPORT_CACHE, REPORT_SOCKET
from xllm.client.reports import Fatal, Heartbeat, Ready, Report, StartPhase
from xllm.config import EngineConfig
from xllm.engine.commands import FLUSH_S, Action, Command, Controlled, Shutdown
from xllm.engine.facts import EngineFacts
from xllm.engine.step_log import StepReport
from xllm.errors import ConfigError, EngineDeadError
from xllm.stats import EngineStats

# For the process to end in order before it is killed, beside what it may spend on storing its KV cache (`FLUSH_S`).
# Chosen: longer than the step in progress and the end of the workers take.
SHUTDOWN_TIMEOUT_S = 5.0
# After a larger frame the event loop gets a turn before the next one is read. Chosen: a small frame costs less than a
# turn.
_LARGE_FRAME_BYTES = 2**15
logger = logging.getLogger("xllm.client")


async def _nothing() -> None:
    pass


class ProcessClient(CommandingClient):
    """One engine process. Make it, `await start()`, use it, `await shutdown()`.

    `on_phase(name, share, seconds since start)` is called as the start-up goes on. name: what its log lines call it.
    reports_cache: call `on_cache_changes`.
    """

    def __init__(self, config: EngineConfig, *, on_phase: Callable[[str, float, float], None] | None = None,
                 name: str = "engine", reports_cache: bool = False):
        super().__init__()
        self._config, self._name = config, name
        self._options = [REPORT_CACHE] if reports_cache else []
        self._on_phase = on_phase or (lambda name, share, seconds: None)
        self.dead_by_user_error = False
        self.restarting_after: str | None = None  # why the last process died, while another one starts
        self.phase = "start"
        self.stats = EngineStats()
        self.steps = StepReport()
        self.on_steps: Callable[[StepReport], None] = lambda steps: None  # each heartbeat's
        self._step_age_s: float | None = None
        self._heard_s = self._started_s = time.monotonic()
        self.on_back: Callable[[], Awaitable[None]] = _nothing  # before a restarted one takes requests
        self.adapter_folders: dict[str, str | None] = {}  # of those loaded at run time; None: unloaded then
        self._ready_event = asyncio.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._receiver: asyncio.Task[None] | None = None

    @property
    def is_up(self) -> bool:
        """Whether requests are taken."""
        return self.dead_reason is None and self._ready_event.is_set()

    @property
    def engines(self) -> tuple[ProcessClient, ...]:
        """Itself."""
        return (self,)

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def launch(self) -> None:
        """Start the process and begin to listen; returns at once. Call it inside the event loop."""
        self._folder = socket_folder("xllm-", COMMAND_SOCKET)
        self._context = zmq.asyncio.Context()
        self._commands = self._context.socket(zmq.PUSH)
        self._reports = self._context.socket(zmq.PULL)
        for socket, name in ((self._commands, COMMAND_SOCKET), (self._reports, REPORT_SOCKET)):
            socket.set_hwm(0)
            socket.setsockopt(zmq.LINGER, 0)
            socket.bind(f"ipc://{self._folder / name}")
        self._started_s = time.monotonic()
        # start_new_session: a Ctrl-C in the terminal is for the parent, which drains
        self._process = subprocess.Popen(
            [sys.executable, *run_module("xllm.client.engine_process"), *self._options, str(self._folder), self._name],
            stdin=subprocess.PIPE, stdout=2, start_new_session=True, env=env.for_child())
        assert self._process.stdin is not None
        self._process.stdin.write(config_to_json(self._config) + b"\n")
        self._process.stdin.flush()
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._watch, args=(loop, self._process), name="engine-watch", daemon=True).start()
        self._receiver = asyncio.create_task(self._receive(), name="engine-reports")

    async def start(self) -> EngineFacts:
        """Start the engine and wait until it is ready.

        Raises:
            ConfigError: a setting or the checkpoint is wrong. EngineDeadError: the engine failed.
        """
        if self._process is None:
            self.launch()
        await self._ready_event.wait()
        if self.dead_reason is not None:
            raise (ConfigError if self.dead_by_user_error else EngineDeadError)(self.dead_reason)
        assert self.facts is not None
        return self.facts

    async def restart(self, reason: str, pause_s: float = 0.0) -> None:
        """Start another process in place of one that died because of `reason`, after a pause. Until it is ready `facts`
        stay as they were, and requests are refused.

        Raises:
            ConfigError or EngineDeadError: the new one died while it started.
        """
        await self._bury()
        self.dead_reason, self.dead_by_user_error, self.restarting_after = None, False, reason
        self._ready_event.clear()
        try:
            await asyncio.sleep(pause_s)
            self.launch()
            await self.start()
            await self._change_adapters_again()  # before anybody may ask for one
            await self.on_back()
        finally:
            self.restarting_after = None

    async def _change_adapters_again(self) -> None:
        """Bring an engine that has its first adapters to those that the last one had."""
        for name, folder in list(self.adapter_folders.items()):
            if name in self.adapters:
                await self.control_or_log("unload_adapter", name=name)
            if folder is not None:
                await self.control_or_log("load_adapter", name=name, folder=folder)

    def end_process(self, reason: str) -> None:
        """Kill a process that makes no progress; open requests end with this reason."""
        if self._process is not None:
            self._process.kill()
        self._die(reason)

    def silent_for_s(self) -> float:
        """For how many seconds there has been no sign of progress; 0 while the engine idles and answers."""
        unheard = time.monotonic() - self._heard_s
        return unheard + self._step_age_s if self._step_age_s is not None else unheard

    async def control(self, action: Action, **options: Any) -> Controlled:
        """See `EngineClient.control`. Adapters that are loaded are loaded again when the engine is started again."""
        done = await super().control(action, **options)
        if action == "load_adapter" and done.error is None:
            self.adapter_folders[options["name"]] = options["folder"]
        elif action == "unload_adapter" and done.error is None:
            self.adapter_folders[options["name"]] = None
        return done

    def _check_up(self) -> None:
        super()._check_up()
        if not self._ready_event.is_set():
            raise EngineDeadError(f"it is starting again after: {self.restarting_after or self.phase}")

    async def shutdown(self) -> None:
        """Stop the process, by force if it does not answer, and remove the sockets. Idempotent."""
        if self._process is not None and self.dead_reason is None:
            self._send(Shutdown())
            await self._exited(self._process, self._shutdown_s if self._ready_event.is_set() else 0.0)
        await self._bury()

    @property
    def _shutdown_s(self) -> float:
        """How long the process may take to end in order: a KV cache on disk is stored first."""
        return SHUTDOWN_TIMEOUT_S + (FLUSH_S if self._config.cache.outlives_the_process else 0.0)

    async def _bury(self) -> None:
        """Kill the process if it has not ended, reap it, and remove the sockets."""
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

    def _send(self, command: Command) -> None:
        # A PUSH without a high-water mark takes every message at once, so the returned future is done.
        self._commands.send(COMMANDS.encode(command))

    async def _receive(self) -> None:
        try:
            while True:
                frame = await self._reports.recv()
                self._heard_s = time.monotonic()
                self._take(REPORTS.decode(frame))
                if len(frame) > _LARGE_FRAME_BYTES:  # others that are there would be read in the same turn
                    await asyncio.sleep(0)
        except Exception as error:  # a bug of ours; no reader may wait for deltas that never come
            logger.exception("reading the engine's reports failed")
            self._die(f"its reports cannot be read: {type(error).__name__}")

    def _take(self, report: Report) -> None:
        if isinstance(report, Heartbeat):
            self.stats, self._step_age_s, self.steps = report.stats, report.step_age_s, report.steps
            self.on_steps(report.steps)
        elif isinstance(report, StartPhase):
            self.phase = report.name
            self._on_phase(report.name, report.share, time.monotonic() - self._started_s)
        elif isinstance(report, Ready):
            self.facts, self.phase, self.adapters = report.facts, "ready", report.facts.adapters
            self.adapter_digests = report.facts.adapter_digests
            self.sleep_level = 0
            self._ready_event.set()
        elif isinstance(report, Fatal):
            if self.dead_reason is None:
                self.dead_by_user_error = report.user_error
            self._die(report.reason)
        else:
            self._hand_out(report)

    def _watch(self, loop: asyncio.AbstractEventLoop, process: subprocess.Popen[bytes]) -> None:
        end = ChildEnd(process)
        reason = f"the engine process {end.reason(end.wait())}"
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
            # Its own last words come first.
            loop.call_soon_threadsafe(lambda: loop.call_later(0.2, self._note_end, process, reason))

    def _note_end(self, process: subprocess.Popen[bytes], reason: str) -> None:
        if process is self._process:
            self._die(reason)

    def _die(self, reason: str) -> None:
        super()._die(reason)
        self.phase = "dead"
        # What it was doing it does no more; totals stay until another process counts from 0.
        self.stats = dataclasses.replace(self.stats, num_running=0, num_waiting=0, num_waiting_by_reason={},
                                         oldest_waiting_s=0.0)
        self._ready_event.set()
