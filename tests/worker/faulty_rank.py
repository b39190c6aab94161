"""A rank that goes wrong: `xllm.worker.rank` with the faults of `POINTS` and `TWISTS`, none of which is armed at first.

XLLM_TEST_FAULT is the path of a file. Once it is there, and holds `POINT.ACTION:RANK`, that rank does `ACTION` when
it passes `POINT` next: once, for the file is renamed to `PATH.done` then, with the time in it (`time.time()`).

    kill: SIGKILL to itself. raise: a MemoryError. stop: SIGSTOP to itself. exit: ends with code 3. hang: waits for
    ever. spin: computes for ever.

A twist makes the rank do something else than the others and go on. Nothing in the product knows of this.
"""

from __future__ import annotations

import functools
import importlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from xllm.step import ScheduleOutput, StepOutput
from xllm.worker.messages import Settled, Wake

FILE = Path(os.environ.get("XLLM_TEST_FAULT", "/nowhere"))
TAKEN = FILE.with_name(FILE.name + ".done")
SLOW = FILE.with_name(FILE.name + ".slow")  # there: the other ranks come late to an exchange
INSIDE_S = 0.3  # until a rank is hit that waits in an exchange; the others come late by twice that time

# Where a rank passes: name -> (module, function, which calls count by their arguments).
Condition = Callable[..., bool]
POINTS: dict[str, tuple[str, str, Condition]] = {
    "meet": ("xllm.parallel.seat", "Seat.join", lambda *_: True),
    "weights": ("xllm.models.weights", "WeightSource.take", lambda *_: True),
    "warm_up": ("xllm.runner.model_runner", "ModelRunner.warm_up", lambda *_: True),
    "capture": ("graph.checking", "CheckingCapturer.capture", lambda *_: True),
    "plan": ("xllm.worker.worker", "Worker.receive", lambda self, command: isinstance(command, ScheduleOutput)),
    "step": ("xllm.runner.model_runner", "ModelRunner.start", lambda self, plan: plan.num_rows > 0),
    "exchange": ("xllm.parallel.groups", "Group._exchange", lambda *_: True),
    "draw": ("xllm.runner.sampler", "Sampler.draw", lambda *_: True),
    "report": ("xllm.worker.rank", "Reporter.send", lambda self, report: isinstance(report, (StepOutput, Settled))),
    "grammar": ("xllm.structured.store", "build_matcher", lambda *_: True),
    "move": ("xllm.kv.performer", "MovePerformer.run", lambda *_: True),
    "sleep": ("xllm.worker.worker", "Worker._free", lambda *_: True),
    "wake": ("xllm.worker.worker", "Worker._sleep_or_wake", lambda self, command: isinstance(command, Wake)),
    "stop": ("xllm.worker.worker", "Worker._shut_down", lambda *_: True),
}


def take(point: str, action: str | None = None) -> str | None:
    """The action that is armed for a point, if it is `action` or that is None; it is disarmed."""
    if not FILE.exists():
        return None
    try:
        armed, _, rank = FILE.read_text().partition(":")
        where, _, found = armed.partition(".")
        if where != point or action not in (None, found) or rank != sys.argv[2]:
            return None
        FILE.rename(TAKEN)
    except FileNotFoundError:  # another thread, or the other rank, was faster
        return None
    TAKEN.write_text(repr(time.time()))
    return found


def act(action: str) -> None:
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif action == "raise":
        raise MemoryError("no room")
    elif action == "exit":
        os._exit(3)
    elif action == "hang":
        threading.Event().wait()
    else:
        assert action == "spin", action
        while True:
            pass


def wrap(module: str, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace a function, or a method `Class.name`, by what `make` makes of it."""
    owner: Any = importlib.import_module(module)
    *outer, last = name.split(".")
    for part in outer:
        owner = getattr(owner, part)
    inner = getattr(owner, last)
    setattr(owner, last, functools.wraps(inner)(make(inner)))


def watched(point: str, counts: Condition) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def make(inner: Callable[..., Any]) -> Callable[..., Any]:
        def passed(*arguments: Any, **options: Any) -> Any:
            if counts(*arguments) and (action := take(point)) is not None:
                act(action)
            return inner(*arguments, **options)

        return passed

    return make


def inside(exchange: Callable[..., Any]) -> Callable[..., Any]:
    """Act while the rank waits in an exchange to which the others come late."""
    def passed(*arguments: Any, **options: Any) -> Any:
        if SLOW.exists() and SLOW.read_text() != sys.argv[2]:
            SLOW.unlink()
            time.sleep(2 * INSIDE_S)
        elif (action := take("inside")) is not None:
            SLOW.write_text(sys.argv[2])
            threading.Timer(INSIDE_S, act, (action,)).start()
        return exchange(*arguments, **options)

    return passed


# --- twists: a function that makes another of it


def other_step(perform: Callable[..., Any]) -> Callable[..., Any]:
    """A plan comes with another number, is lost, or has a row less."""
    def passed(self: Any, command: Any) -> Any:
        if isinstance(command, ScheduleOutput) and command.num_rows > 1 and (action := take("plan_of")) is not None:
            if action == "lost":
                return None
            command = replace(command, step=command.step + 1) if action == "another" else replace(
                command, rows_S=command.rows_S[1:], num_tokens_S=command.num_tokens_S[1:],
                max_drafts_S=command.max_drafts_S[1:], samples_S=command.samples_S[1:])
        return perform(self, command)

    return passed


def other_inputs(gather: Callable[..., Any]) -> Callable[..., Any]:
    def passed(*arguments: Any, **options: Any) -> Any:
        batch = gather(*arguments, **options)
        if take("inputs", "other") is not None:
            batch.input_ids_T[:] = (batch.input_ids_T + 1) % 256
        return batch

    return passed


def other_key(key_of: Callable[..., Any]) -> Callable[..., Any]:
    def passed(*arguments: Any) -> Any:
        key = key_of(*arguments)
        if key is not None and take("key", "other") is not None:
            return replace(key, num_tokens=2 * key.num_tokens, num_seqs=2 * key.num_seqs)
        return key

    return passed


def other_tokens(draw: Callable[..., Any]) -> Callable[..., Any]:
    def passed(*arguments: Any) -> Any:
        token_ids_Q, *others = draw(*arguments)
        return (token_ids_Q if take("tokens", "other") is None else token_ids_Q ^ 1, *others)

    return passed


def other_size(all_reduce: Callable[..., Any]) -> Callable[..., Any]:
    """An exchange of another size than the others', which no step has announced."""
    def passed(self: Any, x: Any) -> Any:
        return all_reduce(self, x if take("size", "other") is None else x.new_zeros(3))

    return passed


def corrupted(checked: Callable[..., Any]) -> Callable[..., Any]:
    """The first KV block that is filled gets another number in it before its digest is taken."""
    def passed(self: Any, output: Any) -> Any:
        blocks = [block for _, blocks_B in self._filled for block in blocks_B.tolist()]
        if blocks and take("block", "other") is not None:
            self._kv_cache.layers[-1][-1][blocks[0]].view(-1)[-1] += 1.0
        return checked(self, output)

    return passed


def other_files(read: Callable[..., Any]) -> Callable[..., Any]:
    """Another checkpoint takes the place of the one to be read before this rank reads."""
    def passed(self: Any, *arguments: Any) -> Any:
        if take("files", "other") is not None:
            change(self.path)
        return read(self, *arguments)

    return passed


def files_change(take_tensor: Callable[..., Any]) -> Callable[..., Any]:
    def passed(self: Any, *arguments: Any, **options: Any) -> Any:
        if take("files", "change") is not None:
            folder = self._location
            change(folder if folder.is_dir() else folder.parent)
        return take_tensor(self, *arguments, **options)

    return passed


def change(folder: Path) -> None:
    path = next(folder.glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2:] = bytes(len(content) - len(content) // 2)
    other = folder / "other"
    other.write_bytes(content)
    other.rename(path)


TWISTS = [
    ("xllm.worker.worker", "Worker.perform", other_step),
    ("xllm.runner.model_runner", "gather_batch", other_inputs),
    ("xllm.runner.graphs", "GraphedForward.key_of", other_key),
    ("xllm.runner.sampler", "Sampler.draw", other_tokens),
    ("xllm.parallel.groups", "Group.all_reduce", other_size),
    ("xllm.parallel.groups", "Group._exchange", inside),
    ("xllm.runner.step_checker", "StepChecker.checked", corrupted),
    ("xllm.worker.loading", "LoadedModel._read", other_files),
    ("xllm.models.weights", "WeightSource.take", files_change),
]


def install() -> None:
    for point, (module, name, counts) in POINTS.items():
        wrap(module, name, watched(point, counts))
    for module, name, make in TWISTS:
        wrap(module, name, make)


if __name__ == "__main__":
    if (action := take("start")) is not None:
        act(action)
    install()
    from xllm.worker.rank import main  # after its parts were wrapped

    os._exit(main(sys.argv[1:]))
