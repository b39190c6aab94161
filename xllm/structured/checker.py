"""`GrammarChecker`: finds out whether a `StructuredOutput` can be compiled, in processes that may be killed for it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import select
import signal
import subprocess
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict

from xllm import env
from xllm.child_process import run_module
from xllm.errors import RequestError
from xllm.structured.grammar_compiler import COMPILE_CPU_S, TOO_MUCH_MEMORY
from xllm.structured.spec import StructuredOutput
from xllm.structured.token_trie import VocabularySource, need_llguidance

# For an answer, where a busy machine keeps the limit on CPU time from being reached. Chosen: several times
# `COMPILE_CPU_S`.
WALL_TIMEOUT_S = 15.0
# For the process to read the vocabulary, which takes about a second for 150,000 tokens; chosen for slow machines.
START_TIMEOUT_S = 60.0
MAX_WORKERS = 2  # processes. Chosen: a slow grammar does not hold up all others, and the cores are left to the steps
# Checks that wait at a time, at up to COMPILE_CPU_S each. Chosen: more callers than that are told to come back.
MAX_WAITING = 32
MAX_REMEMBERED = 1024  # verdicts, a digest and a reason each. Chosen: small, and more forms than an application has
_log = logging.getLogger(__name__)
TOO_SLOW = f"it takes more than {COMPILE_CPU_S} s to compile"


class GrammarBusyError(RequestError):
    """Raised when as many grammars wait to be compiled as are allowed (MAX_WAITING)."""


class GrammarChecker:
    """Compiles grammars in processes beside this one, to see whether they can be. A process is started when it is first
    needed, and killed if it takes too long.

    Usable from several threads. Remembers the last MAX_REMEMBERED verdicts.
    """

    def __init__(self, source: Callable[[], VocabularySource]):
        """source: called once, at the first check."""
        self._source = source
        self._lock = threading.Lock()  # of the next three
        self._verdicts: OrderedDict[bytes, str | None] = OrderedDict()
        self._num_waiting = 0
        self._idle: list[_Worker] = []
        self._pool = ThreadPoolExecutor(max_workers=MAX_WORKERS, thread_name_prefix="xllm-grammar-check")

    def check(self, spec: StructuredOutput) -> None:
        """Wait for the verdict on `spec`. Raises RequestError whose `field` is one of spec's fields, or
        GrammarBusyError."""
        self.submit(spec).result()

    def submit(self, spec: StructuredOutput) -> Future[None]:
        """Begin a check; the future's result is None, or it raises what `check` raises. Raises GrammarBusyError at
        once."""
        done: Future[None] = Future()
        key = hashlib.blake2b(f"{spec.kind}\0{spec.after or ''}\0{spec.source}".encode(), digest_size=16).digest()
        with self._lock:
            if key in self._verdicts:
                self._verdicts.move_to_end(key)
                _settle(done, spec, self._verdicts[key])
                return done
            if self._num_waiting >= MAX_WAITING:
                raise GrammarBusyError("too many structured outputs are being compiled; try again later")
            self._num_waiting += 1
        try:
            return self._pool.submit(self._judge, spec, key)
        except RuntimeError:
            raise RequestError("the engine was shut down") from None

    def _judge(self, spec: StructuredOutput, key: bytes) -> None:
        try:
            with self._lock:
                known = key in self._verdicts
            if not known:
                verdict = self._ask(spec)
                with self._lock:
                    self._verdicts[key] = verdict
                    if len(self._verdicts) > MAX_REMEMBERED:
                        self._verdicts.popitem(last=False)
        finally:
            with self._lock:
                self._num_waiting -= 1
        _raise(spec, self._verdicts.get(key))

    def _ask(self, spec: StructuredOutput) -> str | None:
        worker = self._take_idle() or _Worker(self._source())
        try:
            return worker.ask(spec)
        finally:
            with self._lock:
                if worker.is_alive:
                    self._idle.append(worker)

    def _take_idle(self) -> _Worker | None:
        """Take an idle worker whose process still lives; None if there is none."""
        with self._lock:
            while self._idle:
                worker = self._idle.pop()
                if worker.is_alive:
                    return worker
                worker.stop()
        return None

    def close(self) -> None:
        """Wait for what is being compiled, then end the processes."""
        self._pool.shutdown(wait=True)
        while self._idle:
            self._idle.pop().stop()


def _settle(done: Future[None], spec: StructuredOutput, verdict: str | None) -> None:
    try:
        _raise(spec, verdict)
        done.set_result(None)
    except RequestError as error:
        done.set_exception(error)


def _raise(spec: StructuredOutput, verdict: str | None) -> None:
    if verdict is not None:
        raise RequestError(f"{spec.kind}: {verdict}", field=spec.kind)


class _Worker:
    """A compiling process (`grammar_compiler.py`). Used by one thread at a time."""

    def __init__(self, source: VocabularySource):
        need_llguidance()
        self._process = subprocess.Popen([sys.executable, *run_module("xllm.structured.grammar_compiler")],
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                         start_new_session=True, env=env.for_untrusted_child())
        self.stop = weakref.finalize(self, _stop, self._process)
        self._send(json.dumps(asdict(source)))
        if self._read(START_TIMEOUT_S) is None:
            self.stop()
            _log.error("the process that compiles grammars does not start; "
                       "`%s -m xllm.structured.grammar_compiler` says why", sys.executable)
            raise RequestError("structured outputs cannot be compiled: the process for it does not start",
                               field="structured")

    @property
    def is_alive(self) -> bool:
        return self.stop.alive and self._process.poll() is None

    def ask(self, spec: StructuredOutput) -> str | None:
        """Why `spec` cannot be honoured; None: it can. Blocks until the process answers, ends, or is killed for its
        slowness."""
        self._send(json.dumps({spec.kind: getattr(spec, spec.kind), "after": spec.after}))
        answer = self._read(WALL_TIMEOUT_S)
        if answer is not None:
            return json.loads(answer)["error"]
        ended_by_itself = self._process.poll() is not None
        self.stop()
        code = self._process.returncode
        return TOO_SLOW if not ended_by_itself or code == -signal.SIGXCPU else TOO_MUCH_MEMORY

    def _send(self, line: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `_read` will see that it has ended
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()

    def _read(self, timeout_s: float) -> bytes | None:
        """Read one line; None if it does not come in time or the process ends."""
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], timeout_s)
        line = self._process.stdout.readline() if ready else b""
        if not line and ready:
            self._process.wait()
        return line or None


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
