"""A rank's own process: `python -m xllm.worker.rank FOLDER RANK NUM_RANKS [STORE]`, started by `ProcessLink`.

The main thread computes. One thread takes the commands, one sends signs of life. Stdin stays open for as long as the
engine lives; its end is how a lost engine is noticed.
"""

from __future__ import annotations

import logging
import queue
import signal
import sys
import threading
from pathlib import Path

import zmq

from xllm import env, logs
from xllm.child_process import end_with_parent, exit_at_once
from xllm.parallel.interfaces import interface_to
from xllm.parallel.seat import Seat
from xllm.worker.failures import as_failed
from xllm.worker.last_word import LastWord
from xllm.worker.message_codec import decode, encode
from xllm.worker.messages import StepBegun, StopWorker, WorkerCommand, WorkerReport
from xllm.worker.processes import HEARTBEAT_S
from xllm.worker.worker import Worker

LINGER_MS = 2000  # for the last reports to be sent when the process ends. Chosen: as in `client/engine_process.py`
GROUP_FILE = "group"  # where ranks that share a model meet
logger = logging.getLogger(__name__)


class Reporter:
    """Sends a rank's reports, from whichever thread."""

    def __init__(self, rank: int, folder: Path, context: zmq.Context[zmq.Socket[bytes]]):
        self._origin = bytes([rank])
        self._last_word = LastWord(folder, rank)
        self._lock = threading.Lock()
        self._socket = context.socket(zmq.PUSH)
        self._socket.set_hwm(0)
        self._socket.connect(f"ipc://{folder / 'reports'}")

    def send(self, report: WorkerReport) -> None:
        if isinstance(report, StepBegun):
            self._last_word.put(report)
        frame = encode(report)
        with self._lock:
            self._socket.send_multipart((self._origin, frame))

    def close(self) -> None:
        with self._lock:
            self._socket.close(linger=LINGER_MS)
            self._last_word.close()


def main(argv: list[str]) -> int:
    folder, rank, num_ranks = Path(argv[0]), int(argv[1]), int(argv[2])
    logs.configure(f"rank{rank}")
    logs.take_over()
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)  # sent to a whole process group; the engine ends us
    store = argv[3] if len(argv) > 3 else f"file://{folder / GROUP_FILE}"  # in a folder that no other user may enter
    if store.startswith("file://"):
        env.keep_exchanges_local()
    else:
        env.exchange_over(interface_to(store))
    end_with_parent(folder)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    reporter = Reporter(rank, folder, context)
    worker = Worker(reporter.send, num_ranks=num_ranks, seat=Seat(rank=rank, store=store))
    commands: queue.SimpleQueue[WorkerCommand] = queue.SimpleQueue()
    socket = context.socket(zmq.PULL)
    socket.set_hwm(0)
    socket.connect(f"ipc://{folder / f'rank-{rank}'}")
    threading.Thread(target=_take_commands, args=(socket, worker, commands, reporter), name="commands",
                     daemon=True).start()
    threading.Thread(target=_beat, args=(worker, reporter), name="heartbeat", daemon=True).start()
    while True:
        command = commands.get()
        worker.perform(command)
        if isinstance(command, StopWorker):
            reporter.close()
            context.destroy(linger=LINGER_MS)
            return 0


def _take_commands(socket: zmq.Socket[bytes], worker: Worker, commands: queue.SimpleQueue[WorkerCommand],
                   reporter: Reporter) -> None:
    while True:
        frame = socket.recv()
        try:
            command = decode(frame)
            if worker.receive(command):
                commands.put(command)
        except Exception as error:
            logger.exception("a command could not be taken")
            reporter.send(as_failed(error))
            continue
        if isinstance(command, StopWorker):
            socket.close(linger=0)
            return


def _beat(worker: Worker, reporter: Reporter) -> None:
    stopped = threading.Event()
    while not stopped.wait(HEARTBEAT_S):
        try:
            reporter.send(worker.stats())
        except zmq.ZMQError:  # closed: the rank ends
            return
        except Exception:  # the next one may do; silence would end the engine
            logger.exception("a sign of life could not be sent")


if __name__ == "__main__":
    exit_at_once(main(sys.argv[1:]))
