"""`ThreadLink`: the worker in a thread of its own, so that the next step is scheduled while this one runs."""

from __future__ import annotations

import queue
import threading

from xllm.worker.inline import DIRECT, InlineLink, Wire
from xllm.worker.messages import StopWorker, WorkerCommand

# For the step in progress to end at shutdown. Chosen: longer than any step; a thread that hangs is left behind.
CLOSE_S = 30.0


class ThreadLink(InlineLink):
    """A `WorkerLink` to a worker in one thread of this process, which computes everything, the loading of the model
    included. OpenMP keeps a pool of workers for each thread that ever computed, and with two pools on the same cores
    its workers stop spinning between operators (measured: a decode step then takes half as long again)."""

    def __init__(self, *, depth: int, wire: Wire = DIRECT):
        super().__init__(wire=wire)
        self.depth = depth
        self._commands: queue.SimpleQueue[WorkerCommand] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="xllm-worker", daemon=True)
        self._thread.start()

    def send(self, command: WorkerCommand) -> None:
        command = self._wire.down(command)
        if self.worker.receive(command):
            self._commands.put(command)

    def close(self) -> None:
        super().close()
        self._thread.join(CLOSE_S)

    def _run(self) -> None:
        while True:
            command = self._commands.get()
            self.worker.perform(command)
            if isinstance(command, StopWorker):
                return
