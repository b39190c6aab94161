"""Clients of an engine in this process: `LocalClient` runs it in a thread of its own, `InlineClient` in its
caller's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from xllm.client.commanding import CommandingClient
from xllm.engine.commands import Abort, Command, CommandReply, Outputs, Shutdown
from xllm.engine.core import EngineCore
from xllm.engine.loop import EngineLoop
from xllm.errors import (
    EngineDeadError,
    EngineStateError,
    ModelError,
    RequestError,
    XllmError,
    needs_traceback,
    shown_error,
)
from xllm.request import OutputDelta, Request
from xllm.stats import EngineStats

SHUT_DOWN = "it was shut down"
logger = logging.getLogger("xllm.client")


class CommandQueue:
    """A `CommandSource` between two threads."""

    def __init__(self) -> None:
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()

    def put(self, command: Command) -> None:
        self._commands.put(command)

    def take(self, timeout_s: float | None) -> Command | None:
        """The next command, waiting for at most so long (None: for ever); None if none came."""
        try:
            return self._commands.get(block=timeout_s != 0.0, timeout=timeout_s)
        except queue.Empty:
            return None


class LocalClient(CommandingClient):
    """Owns `core`: from now on only its thread touches it, except for `stats`. Belongs to one event loop at a time:
    the one in which it is used, until that is closed."""

    def __init__(self, core: EngineCore):
        super().__init__()
        self.facts = core.facts
        self.adapters = core.adapters.names
        self._core = core
        self._commands = CommandQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._end: str | None = None  # why the thread has ended
        self._thread = threading.Thread(target=self._run, name="xllm-engine", daemon=True)
        self._thread.start()

    @property
    def stats(self) -> EngineStats:
        """What the engine says about itself now."""
        return self._core.stats()

    def bind(self) -> None:
        """Serve the running event loop from now on. Raises RuntimeError while another one is in use."""
        loop = asyncio.get_running_loop()
        if self._loop is loop:
            return
        if self._loop is not None and not self._loop.is_closed():
            raise RuntimeError("this engine is used in another event loop")
        for stream in set(self._streams.values()):  # their event loop is gone, and with it their readers
            stream.close()
        self._loop = loop

    def shutdown(self) -> None:
        """End the thread after the step in progress, and free what the engine holds. Blocks; idempotent."""
        self._commands.put(Shutdown())
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _check_up(self) -> None:
        self.bind()
        if self._end is not None:  # said to an event loop that did not live to hear it
            self._die(self._end)
        super()._check_up()

    def _send(self, command: Command) -> None:
        self._commands.put(command)

    def _take(self, answer: CommandReply) -> None:
        try:
            self._hand_out(answer)
        except Exception as error:  # a bug of ours; no reader may wait for deltas that never come
            self._die(f"its outputs cannot be read: {type(error).__name__}: {error}")
            raise

    # --- in the engine's thread

    def _run(self) -> None:
        reason = SHUT_DOWN
        try:
            EngineLoop(self._core, self._commands, self._report).run()
        except BaseException as error:  # whatever it was, the open requests must hear of it
            reason = shown_error(error)
            logger.error("the engine failed: %s", reason, exc_info=needs_traceback(error))
        try:
            self._core.shutdown()
        finally:
            self._end = end = f"the engine is gone: {reason}"
            self._post(lambda: self._die(end))

    def _report(self, answer: CommandReply) -> None:
        if not self._post(lambda: self._take(answer)) and isinstance(answer, Outputs):
            # No reader is left.
            self._commands.put(Abort([d.request_id for d in answer.deltas if d.finish_reason is None]))

    def _post(self, callback: Callable[[], object]) -> bool:
        """Call `callback` in the event loop. Returns False if there is none, or it is closed."""
        loop = self._loop
        if loop is None or loop.is_closed():
            return False
        try:
            loop.call_soon_threadsafe(callback)
        except RuntimeError:
            if loop.is_closed():  # since we looked
                return False
            raise
        return True


class InlineClient:
    """Runs the steps of `core` in the caller's thread; one thread at a time. If the engine fails, the method that meets
    it first raises EngineDeadError."""

    def __init__(self, core: EngineCore):
        self.core = core
        self.dead_reason: str | None = None
        self._is_closed = False

    @property
    def stats(self) -> EngineStats:
        """What the engine says about itself now; any thread may ask."""
        return self.core.stats()

    def check_up(self) -> None:
        """Raise EngineDeadError if the engine failed or was shut down."""
        if self.dead_reason is not None:
            raise EngineDeadError(f"the engine is gone: {self.dead_reason}")

    def add(self, request: Request) -> None:
        """Queue a request. Raises RequestError; nothing is queued then."""
        with self._failing():
            self.core.add(request)

    def abort(self, request_id: str) -> None:
        """End a request; its terminal delta comes from the next `step`. Unknown ids are ignored."""
        self.core.abort(request_id)

    def step(self) -> list[OutputDelta]:
        """Run one step; returns the outputs of all requests that changed."""
        with self._failing():
            return self.core.step()

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """A context: an exception inside ends the engine, unless it says that the caller asked for something
        impossible."""
        try:
            yield
        except (RequestError, ModelError, EngineStateError):
            raise
        except Exception as error:
            self.dead_reason = f"{type(error).__name__}: {error}"
            raise EngineDeadError(f"the engine failed: {self.dead_reason}") from error

    def abandon(self, request_ids: Iterable[str]) -> None:
        """End requests, and step until the engine is idle."""
        for request_id in request_ids:
            self.core.abort(request_id)
        while self.dead_reason is None and self.core.has_work():
            self.step()

    def load_adapter(self, name: str, folder: Path) -> None:
        """Load an adapter; blocks until it is loaded. Raises as `EngineCore.load_adapter` says and as reading it
        does."""
        self.check_up()
        done: list[XllmError | None] = []
        with self._failing():
            self.core.load_adapter(name, folder, done.append)
            while not done:
                time.sleep(self.core.idle_s() or 0.0)
                self.core.tick()
        if done[0] is not None:
            raise done[0]

    def unload_adapter(self, name: str) -> None:
        """Unload an adapter. Raises as `EngineCore.unload_adapter` says."""
        self.check_up()
        with self._failing():
            self.core.unload_adapter(name)

    def shutdown(self) -> None:
        """Free what the engine holds, also that of one that failed. Idempotent."""
        if not self._is_closed:
            self._is_closed = True
            self.dead_reason = self.dead_reason or SHUT_DOWN
            self.core.shutdown()
