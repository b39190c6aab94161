"""The engine's own process: `python -m serving.engine_process FOLDER`, started by `EngineClient`.

Reads its config as one JSON line from stdin, then speaks `serving.protocol` over the two unix sockets in
FOLDER. Stdin stays open for as long as the parent lives; its end is how a lost parent is noticed.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import zmq

from serving import protocol
from serving.adapter_reader import AdapterReader
from serving.step_log import StepLog
from xllm import env
from xllm.config import EngineConfig
from xllm.engine.control import PauseMode
from xllm.errors import ConfigError, DeviceError, DiskError, EngineStateError, ModelError, RequestError, XllmError

if TYPE_CHECKING:
    from xllm.engine.core import EngineCore

COMMAND_SOCKET, REPORT_SOCKET = "commands", "reports"
LINGER_MS = 2000
ADAPTER_POLL_MS = 20
BUSY_HEARTBEAT_S, IDLE_HEARTBEAT_S = 0.25, 1.0
logger = logging.getLogger("xllm.engine")


class ReportSender:
    """A sending end of the report socket. Not thread-safe: every thread makes its own."""

    def __init__(self, context: zmq.Context, folder: Path):
        self._socket = context.socket(zmq.PUSH)
        self._socket.set_hwm(0)
        self._socket.connect(f"ipc://{folder / REPORT_SOCKET}")

    def send(self, report: protocol.Report) -> None:
        self._socket.send(protocol.encode(report))

    def close(self) -> None:
        self._socket.close(linger=LINGER_MS)


class Heart(threading.Thread):
    """Reports stats and progress from outside the step loop, so that a step that hangs is seen to hang."""

    def __init__(self, core: EngineCore, steps: StepLog, context: zmq.Context, folder: Path):
        super().__init__(name="heartbeat", daemon=True)
        self._core, self._steps, self._context, self._folder = core, steps, context, folder
        self._wake = threading.Event()
        self._stopped = False
        self._busy_since: float | None = None

    def set_busy(self, busy: bool) -> None:
        """Called by the step loop when work begins and when there is none left."""
        if busy == (self._busy_since is not None):
            return
        self._busy_since = time.monotonic() if busy else None
        self._wake.set()  # so that the gauges fall to zero at once, not a beat later

    def stop(self) -> None:
        self._stopped = True
        self._wake.set()
        self.join(timeout=2.0)

    def run(self) -> None:
        sender = ReportSender(self._context, self._folder)
        while not self._stopped:
            self._wake.clear()
            sender.send(self._beat())
            self._wake.wait(IDLE_HEARTBEAT_S if self._busy_since is None else BUSY_HEARTBEAT_S)
        sender.close()

    def _beat(self) -> protocol.Heartbeat:
        busy_since = self._busy_since
        stats = self._core.stats()
        age_s = None if busy_since is None else time.monotonic() - max(busy_since, stats.last_step_s)
        return protocol.Heartbeat(age_s, stats, self._steps.take())


class EngineServer:
    """Serves one `EngineCore` until told to stop: take commands, step, report."""

    def __init__(self, core: EngineCore, steps: StepLog, commands: zmq.Socket, sender: ReportSender, heart: Heart):
        self._core, self._steps, self._commands, self._sender, self._heart = core, steps, commands, sender, heart
        self._reader = AdapterReader(core.adapters)
        core.scheduler.take_admissions()  # from now on they are kept
        self._stopping = False

    def run(self) -> None:
        while True:
            self._take_commands(block=not self._core.has_work())
            self._enter_adapters()
            if self._stopping:
                return
            busy = self._core.has_work()
            self._heart.set_busy(busy)
            if busy:
                self._step()

    def _step(self) -> None:
        loop, scheduler = self._core.loop, self._core.scheduler
        num_before, num_seqs = loop.num_steps, scheduler.num_running
        deltas = self._core.step()
        if loop.num_steps != num_before:  # sequences come and go around a step; it had at most so many
            self._steps.note(loop.last_step_s, loop.step_time_s, scheduler.rates.last_num_tokens,
                             max(num_seqs, scheduler.num_running))
        admitted = scheduler.take_admissions()
        if deltas or admitted:
            self._sender.send(protocol.Outputs(deltas, admitted))

    def _take_commands(self, *, block: bool) -> None:
        """Apply all commands that have come; wait for the first one if `block`."""
        if block:
            self._heart.set_busy(False)
            self._wait()
        while not self._stopping:
            try:
                frame = self._commands.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._apply(frame)

    def _wait(self) -> None:
        """Until a command comes; meanwhile the KV tiers go on with theirs. Not for long while an adapter is read."""
        while (idle_s := self._core.idle_s()) is not None:
            if self._commands.poll(int(idle_s * 1000)):
                return
            self._core.tick()
            if self._reader.is_busy:
                return
        self._commands.poll(ADAPTER_POLL_MS if self._reader.is_busy else None)

    def _apply(self, frame: bytes) -> None:
        command = protocol.COMMANDS.decode(frame)
        if isinstance(command, protocol.Submit):
            self._submit(command)
        elif isinstance(command, protocol.Abort):
            for request_id in command.request_ids:
                self._core.abort(request_id)
        elif isinstance(command, protocol.Control):
            self._control(command)
        else:
            self._stopping = True

    def _control(self, command: protocol.Control) -> None:
        control, num_blocks = self._core.control, 0
        try:
            if command.action == "pause":
                control.pause(PauseMode(command.mode))
            elif command.action == "resume":
                control.resume()
            elif command.action == "sleep":
                control.sleep(command.level)
            elif command.action == "wakeup":
                control.wake_up()
            elif command.action == "reset_prefix_cache":
                num_blocks = control.reset_prefix_cache()
            elif command.action == "load_adapter":
                self._reader.begin(command)
                return  # answered when it has been read
            elif command.action == "unload_adapter":
                self._core.adapters.unload(command.name)
        except XllmError as error:
            self._answer(command, error)
        else:
            self._answer(command, num_blocks=num_blocks)

    def _enter_adapters(self) -> None:
        while (done := self._reader.take_done()) is not None:
            command, read = done
            try:
                self._core.adapters.enter(command.name, read.result())
            except XllmError as error:
                self._answer(command, error)
            else:
                self._answer(command)

    def _answer(self, command: protocol.Control, error: XllmError | None = None, num_blocks: int = 0) -> None:
        control = self._core.control
        state = protocol.EngineState(control.mode.value if control.mode else None, control.sleep_level,
                                     self._core.num_open, self._core.adapters.names)
        self._sender.send(protocol.Controlled(
            command.number, state, num_blocks, None if error is None else str(error), getattr(error, "field", None),
            isinstance(error, EngineStateError)))

    def _submit(self, command: protocol.Submit) -> None:
        accepted: list[str] = []
        rejected: list[protocol.Rejection] = []
        for request in command.requests:
            try:
                self._core.add(request)
                accepted.append(request.request_id)
            except RequestError as error:
                rejected.append(protocol.Rejection(request.request_id, str(error), error.field))
        self._sender.send(protocol.Admissions(accepted, rejected))


def main(argv: list[str]) -> int:
    folder = Path(argv[0])
    logging.basicConfig(level=env.log_level(), stream=sys.stderr, format="%(asctime)s engine %(levelname)s %(message)s")
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)  # sent to the whole process group; the parent drains, then stops us
    config = protocol.config_from_json(sys.stdin.buffer.readline())
    threading.Thread(target=_exit_with_parent, args=(folder,), name="parent-watch", daemon=True).start()
    context = zmq.Context()
    sender = ReportSender(context, folder)
    try:
        _serve(config, context, sender, folder)
    except Exception as error:
        user_error = isinstance(error, (ConfigError, ModelError, DeviceError, DiskError))
        if user_error:
            logger.error("%s", error)
        else:
            logger.exception("the engine failed")
        sender.send(protocol.Fatal(str(error) if user_error else f"{type(error).__name__}: {error}", user_error))
        return 1
    finally:
        context.destroy(linger=LINGER_MS)  # waits until the last words are out
    return 0


def _serve(config: EngineConfig, context: zmq.Context, sender: ReportSender, folder: Path) -> None:
    from xllm.engine.core import EngineCore  # imports torch: only after the sockets stand

    core = EngineCore(config, progress=lambda name, share: sender.send(protocol.Phase(name, share)))
    commands = context.socket(zmq.PULL)
    commands.set_hwm(0)
    commands.connect(f"ipc://{folder / COMMAND_SOCKET}")
    sender.send(protocol.Ready(core.config, str(core.model_path), core.model_config.vocab_size,
                               tuple(core.model_config.eos_token_ids), core.num_blocks, core.adapters.names))
    steps = StepLog()
    heart = Heart(core, steps, context, folder)
    heart.start()
    try:
        EngineServer(core, steps, commands, sender, heart).run()
        core.shutdown()
    finally:
        heart.stop()
        commands.close(linger=0)


def _exit_with_parent(folder: Path) -> None:
    while sys.stdin.buffer.read(4096):
        pass
    shutil.rmtree(folder, ignore_errors=True)  # nobody else is left to do it
    os._exit(1)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a step that hangs in a native thread must not keep the process alive
