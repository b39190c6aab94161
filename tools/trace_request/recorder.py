"""What runs inside the traced processes: which of our functions were called, and what of ours they were handed.

`python -m tools.trace_request` puts a `sitecustomize.py` before all else on the path of the processes that it starts,
which calls `install`. Nothing of the product knows of it. What is recorded follows the files in the folder:

    (none)   nothing
    warm     our objects that functions are handed are kept alive: those that are met again are parts, not messages
    idle     the functions that run while there is no request, and the types of new objects that they are handed
    record   the same of the one request
    done     `<process id>.json` is written, and the thread ends
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from enum import Enum
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

OWN = ("serving", "xllm", "graph", "backends", "cuda_ops", "npu_ops")
FOREIGN = ("starlette.requests.Request",)  # a type that carries a request though it is not ours
FOLDER = "XLLM_TRACE_FOLDER"  # in the environment of the traced processes
PHASES = ("warm", "idle", "record", "done")
POLL_S = 0.005


def install() -> None:
    """Trace this process from here on, in every thread; nothing where the folder is not named."""
    folder = os.environ.get(FOLDER)
    if folder is not None:
        recorder = Recorder(Path(folder))
        threading.Thread(target=recorder.watch, name="trace-request", daemon=True).start()
        threading.setprofile(recorder.see)  # threads that start from now on
        sys.setprofile(recorder.see)


class Recorder:
    """One process's share of the trace."""

    def __init__(self, folder: Path):
        self.folder, self.phase = folder, ""
        self.kept: dict[int, object] = {}  # by id, which stays theirs while they live
        self.idle: set[tuple[str, str]] = set()
        self.visits: dict[tuple[str, str], int] = {}  # (module, function) -> when it was first called
        self.idle_types: set[str] = set()
        self.types: dict[str, int] = {}  # module.Class -> when one that is new was first handed on

    def watch(self) -> None:
        """Follow the files until the last is there."""
        while self.phase != PHASES[-1]:
            self.phase = next((phase for phase in reversed(PHASES) if (self.folder / phase).exists()), "")
            time.sleep(POLL_S)
        report = {"command": sys.orig_argv, "idle": sorted(self.idle), "idle_types": sorted(self.idle_types),
                  "visits": [[*visit, when] for visit, when in self.visits.items()], "types": self.types}
        partial = self.folder / f"{os.getpid()}.partial"
        partial.write_text(json.dumps(report))
        partial.rename(partial.with_suffix(".json"))

    def see(self, frame: FrameType, event: str, value: object) -> None:
        """The interpreter's call: a function is entered or left with a value."""
        if not self.phase or event not in ("call", "return"):
            return
        module = frame.f_globals.get("__name__", "")
        if not isinstance(module, str) or module.partition(".")[0] not in OWN:
            return
        if event == "return":
            self._meet(value)
            return
        code = frame.f_code
        if code.co_name.startswith("<") or code.co_filename.startswith("<"):
            return  # part of the function around it, or what `dataclass` writes
        for name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]:
            self._meet(frame.f_locals.get(name))
        visit = (module, function_name(code))
        if self.phase == "idle":
            self.idle.add(visit)
        elif self.phase == "record":
            self.visits.setdefault(visit, time.monotonic_ns())

    def _meet(self, value: Any) -> None:
        """value, or what lies in a list or tuple of them: a batch of messages is messages."""
        if isinstance(value, (list, tuple)) and type(value).__module__ == "builtins":
            for each in value[:8]:
                self._meet_one(each)
        else:
            self._meet_one(value)

    def _meet_one(self, value: object) -> None:
        kind = type(value)
        name = f"{kind.__module__}.{kind.__qualname__}"
        if kind.__module__.partition(".")[0] not in OWN and name not in FOREIGN:
            return
        if isinstance(value, (type, Enum, BaseException)) or id(value) in self.kept:
            return
        if self.phase == "record":
            self.types.setdefault(name, time.monotonic_ns())
            return
        self.kept[id(value)] = value
        if self.phase == "idle":
            self.idle_types.add(name)


def function_name(code: CodeType) -> str:
    """`Class.method`; before Python 3.11 without the class."""
    return str(getattr(code, "co_qualname", code.co_name)).replace(".<locals>", "")
