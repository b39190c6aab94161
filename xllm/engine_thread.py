"""`EngineThread`: runs an `EngineCore` in a thread of its own.

Commands go in through a queue, on which the thread sleeps when there is no work; results come out
through callbacks, which are called in that thread.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence

from xllm.engine.core import EngineCore
from xllm.errors import RequestError
from xllm.request import OutputDelta, Request

log = logging.getLogger(__name__)

Command = Callable[[EngineCore], None]
SHUT_DOWN = "it was shut down"


class EngineThread:
    """Owns `core`: from now on only its thread touches it, except for `core.stats()`.

    on_deltas: called with each step's outputs; False: nobody listens any more, their requests are aborted.
    on_end: called once with the reason, after the last `on_deltas`.
    """

    def __init__(self, core: EngineCore, *, on_deltas: Callable[[list[OutputDelta]], bool],
                 on_end: Callable[[str], None]):
        self._core = core
        self._on_deltas = on_deltas
        self._on_end = on_end
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()  # None: stop
        self._thread = threading.Thread(target=self._run, name="xllm-engine", daemon=True)
        self._thread.start()

    def add(self, requests: Sequence[Request], on_rejected: Callable[[RequestError], object]) -> None:
        """Queue all of `requests` or, if one is refused, none; then `on_rejected` is called."""
        self._commands.put(lambda core: _add_all(core, requests, on_rejected))

    def abort(self, request_ids: Sequence[str]) -> None:
        """End requests early; each still gets its terminal output."""
        if request_ids:
            self._commands.put(lambda core: _abort_all(core, request_ids))

    def stop(self) -> None:
        """Finish the step in progress, end the thread and shut the core down. Waits for it."""
        self._commands.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        reason = SHUT_DOWN
        try:
            while self._obey():
                if self._core.has_work():
                    self._step()
        except BaseException as error:  # whatever it was, the open requests must hear of it
            log.exception("the engine failed")
            reason = f"{type(error).__name__}: {error}"
        try:
            self._core.shutdown()
        finally:
            self._on_end(reason)

    def _obey(self) -> bool:
        """Carry out the commands that are there; when idle, wait for one. False: stop."""
        idle = not self._core.has_work()
        while True:
            try:
                command = self._commands.get(block=idle, timeout=self._core.idle_s() if idle else None)
            except queue.Empty:
                self._core.tick()
                return True
            if command is None:
                return False
            command(self._core)
            idle = False

    def _step(self) -> None:
        deltas = self._core.step()
        if deltas and not self._on_deltas(deltas):
            _abort_all(self._core, [d.request_id for d in deltas if d.finish_reason is None])


def _add_all(core: EngineCore, requests: Sequence[Request], on_rejected: Callable[[RequestError], object]) -> None:
    for index, request in enumerate(requests):
        try:
            core.add(request)
        except RequestError as error:
            _abort_all(core, [r.request_id for r in requests[:index]])
            on_rejected(error)
            return


def _abort_all(core: EngineCore, request_ids: Sequence[str]) -> None:
    for request_id in request_ids:
        core.abort(request_id)
