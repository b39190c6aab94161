"""The engine's own process: `python -m xllm.client.engine_process [report-cache] FOLDER NAME`, started by
`ProcessClient`.

Reads its config as one JSON line from stdin, then takes commands and sends reports (`command_codec.py`) over the two
unix sockets in FOLDER. Stdin stays open for as long as the parent lives; its end is how a lost parent is noticed.
"""

from __future__ import annotations

import logging
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import zmq

from xllm import logs
from xllm.child_process import end_with_parent, exit_at_once
from xllm.client.command_codec import COMMANDS, REPORTS, config_from_json
from xllm.client.reports import Fatal, Heartbeat, Ready, Report, StartPhase
from xllm.config import EngineConfig
from xllm.engine.commands import Command
from xllm.engine.step_log import StepLog
from xllm.errors import ConfigError, DeviceError, DiskError, ModelError, needs_traceback, shown_error

if TYPE_CHECKING:
    from xllm.engine.core import EngineCore

COMMAND_SOCKET, REPORT_SOCKET = "commands", "reports"
REPORT_CACHE = "report-cache"  # as an argument: report which KV blocks can be found
# For the last reports to be sent when the process ends. Chosen: a parent that does not read must not keep it.
LINGER_MS = 2000
# Between heartbeats while the engine has work and while it has none. Chosen: live views look smooth, and an idle engine
# wakes up seldom.
BUSY_HEARTBEAT_S, IDLE_HEARTBEAT_S = 0.25, 1.0
logger = logging.getLogger("xllm.engine")


class ReportSender:
    """A sending end of the report socket. Not thread-safe: every thread makes its own."""

    def __init__(self, context: zmq.Context, folder: Path):
        self._socket = context.socket(zmq.PUSH)
        self._socket.set_hwm(0)
        self._socket.connect(f"ipc://{folder / REPORT_SOCKET}")

    def send(self, report: Report) -> None:
        self._socket.send(REPORTS.encode(report))

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
        """Called by the engine's loop before it steps and before it waits."""
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

    def _beat(self) -> Heartbeat:
        busy_since = self._busy_since
        stats = self._core.stats()
        age_s = None if busy_since is None else time.monotonic() - max(busy_since, stats.last_step_s)
        return Heartbeat(age_s, stats, self._steps.take())


class SocketCommands:
    """A `CommandSource`: the receiving end of the command socket."""

    def __init__(self, context: zmq.Context, folder: Path):
        self._socket = context.socket(zmq.PULL)
        self._socket.set_hwm(0)
        self._socket.connect(f"ipc://{folder / COMMAND_SOCKET}")

    def take(self, timeout_s: float | None) -> Command | None:
        """The next command, waiting for at most so long (None: for ever); None if none came."""
        if timeout_s != 0.0 and not self._socket.poll(None if timeout_s is None else int(timeout_s * 1000)):
            return None
        try:
            return COMMANDS.decode(self._socket.recv(zmq.NOBLOCK))
        except zmq.Again:
            return None

    def close(self) -> None:
        self._socket.close(linger=0)


def main(argv: list[str]) -> int:
    *options, place, name = argv
    folder = Path(place)
    logs.configure(name)
    logs.take_over()
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)  # sent to the whole process group; the parent drains, then stops us
    config = config_from_json(sys.stdin.buffer.readline())
    end_with_parent(folder)
    context = zmq.Context()
    sender = ReportSender(context, folder)
    try:
        _serve(config, context, sender, folder, REPORT_CACHE in options)
    except Exception as error:
        user_error = isinstance(error, (ConfigError, ModelError, DeviceError, DiskError))
        if not user_error:  # of those the parent says what is to be said
            logger.error("the engine failed: %s", shown_error(error), exc_info=needs_traceback(error))
        sender.send(Fatal(str(error) if user_error else shown_error(error), user_error))
        return 1
    finally:
        context.destroy(linger=LINGER_MS)  # waits until the last words are out
    return 0


def _serve(config: EngineConfig, context: zmq.Context, sender: ReportSender, folder: Path,
           reports_cache: bool) -> None:
    from xllm.engine.core import EngineCore  # imports torch: only after the sockets stand
    from xllm.engine.loop import EngineLoop

    core = EngineCore(config, progress=lambda name, share: sender.send(StartPhase(name, share)))
    commands = SocketCommands(context, folder)
    sender.send(Ready(core.facts))
    steps = StepLog()
    heart = Heart(core, steps, context, folder)
    heart.start()
    try:
        EngineLoop(core, commands, sender.send, on_busy=heart.set_busy, steps=steps,
                   reports_cache=reports_cache).run()
        core.shutdown()
    finally:
        heart.stop()
        commands.close()


if __name__ == "__main__":
    exit_at_once(main(sys.argv[1:]))
