"""How every process of ours logs: one line a record on stderr, as text or as JSON, and never waiting for its reader.

`configure` is for processes that are ours alone (the commands and what they start). A program that uses `LLM` has its
own idea of logging, which stays as it is.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import threading
import time
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from datetime import datetime, timezone
from types import TracebackType
from typing import Any, TextIO

from xllm import env
from xllm.log_writer import LogWriter

LEVELS = ("critical", "error", "warning", "info", "debug")
FORMATS = ("text", "json")
# The first parts of our loggers' names; uvicorn's have a level of their own, --uvicorn-log-level.
OURS = frozenset({"xllm", "backends", "graph", "serving", "cuda_ops", "npu_ops", "uvicorn"})
# Of a message, and of a traceback. Chosen: longer than any of ours; a message may quote what strangers sent.
MAX_CHARS = 16384
CONTEXT: ContextVar[dict[str, Any] | None] = ContextVar("log_context", default=None)  # fields of each record made here
_PLAIN = re.compile(r"[\w./:{}@+-]+", re.ASCII)


def configure(process: str, *, level: str | None = None, form: str | None = None, default: str = "info") -> None:
    """Log to stderr from now on. Processes that are started after this log in the same way.

    process: its name in each line. level, form: of LEVELS and FORMATS; None: as the environment says (XLLM_LOG,
    XLLM_LOG_FORMAT), else `default` and text. Raises ConfigError for an environment that says something else.
    """
    level = level or env.one_of("XLLM_LOG", LEVELS) or default
    form = form or env.one_of("XLLM_LOG_FORMAT", FORMATS) or "text"
    env.pass_on_logging(level, form)
    root = logging.getLogger()
    for handler in [found for found in root.handlers if isinstance(found, StderrHandler)]:
        root.removeHandler(handler)
        handler.close()
    number = getattr(logging, level.upper())
    handler = StderrHandler(number)
    handler.setFormatter(JsonFormat(process) if form == "json" else TextFormat(process))
    root.addHandler(handler)
    root.setLevel(min(number, logging.WARNING))
    # What no line of ours says is not looked up for each of them (logging's own advice, "Optimization").
    logging._srcfile = None  # type: ignore[attr-defined]
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False


def take_over() -> None:
    """Log warnings and uncaught exceptions of this process as lines of the log."""
    warnings.showwarning = _log_warning
    sys.excepthook = _log_exception
    threading.excepthook = _log_thread_exception


def is_json() -> bool:
    """Whether this process logs in JSON."""
    return any(isinstance(handler.formatter, JsonFormat) for handler in logging.getLogger().handlers)


def as_json(logger: logging.Logger, text: str) -> str:
    """A line for stdout, of a process whose stderr is in JSON: many collect the two together."""
    return JsonFormat("api").format(logging.LogRecord(logger.name, logging.INFO, __file__, 0, "%s", (text,), None))


def write_by(put: Callable[[str], None] | None) -> None:
    """Hand the lines of this process's log to `put`, in whichever thread they were made: a terminal is drawn on. None:
    to stderr again."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, StderrHandler):
            handler.put = handler.writer.put if put is None else put


def num_lost() -> int:
    """How many lines of this process were dropped because stderr was not read in time."""
    return sum(handler.writer.num_lost for handler in logging.getLogger().handlers
               if isinstance(handler, StderrHandler))


class StderrHandler(logging.Handler):
    """Formats where the record was made, and leaves the writing to a thread. Libraries are heard from WARNING on."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.writer = LogWriter(2, self._complaint)
        self.put: Callable[[str], None] = self.writer.put  # of a line

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING or record.name.partition(".")[0] in OURS:
            self.put(self.format(record))

    def flush(self) -> None:
        """Wait until all is written, for a second at most."""
        if hasattr(self, "writer"):
            self.writer.flush()

    def _complaint(self, num_lost: int) -> str:
        return self.format(logging.LogRecord(
            "xllm.logs", logging.WARNING, __file__, 0,
            "%d lines of this log were lost: nobody read them in time, or they could not be written", (num_lost,),
            None))


class TextFormat(logging.Formatter):
    """`2026-11-30 10:11:12.345 INFO api xllm.serve: text key=value`, local time. A traceback follows, indented.

    The fields of a record are `CONTEXT` and its attribute `fields`; its attribute `said` names those that are in the
    text of its message as well.
    """

    def __init__(self, process: str):
        super().__init__()
        self._process = process
        self._second, self._shown_second = -1, ""

    def format(self, record: logging.LogRecord) -> str:
        second = int(record.created)
        if second != self._second:
            self._second, self._shown_second = second, time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(second))
        said = getattr(record, "said", ())
        fields = "".join(f" {name}={_field_text(value)}" for name, value in _fields(record).items()
                         if value is not None and name not in said)
        line = (f"{self._shown_second}.{int(record.msecs):03d} {record.levelname} {self._process} {record.name}: "
                f"{on_one_line(_message(record))}{fields}")
        if trace := self._trace(record):
            line += "".join("\n    " + on_one_line(part) for part in trace.split("\n"))
        return line

    def _trace(self, record: logging.LogRecord) -> str:
        return self.formatException(record.exc_info)[-MAX_CHARS:] if record.exc_info else ""


class JsonFormat(TextFormat):
    """One object a line: time (UTC), level, process, logger, message, the record's fields, and `exception`."""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        shown: dict[str, Any] = {**_fields(record), "time": when, "level": record.levelname, "process": self._process,
                                 "logger": record.name, "message": _message(record)}
        first = ("time", "level", "process", "logger", "message")
        shown = {name: shown[name] for name in (*first, *(name for name in shown if name not in first))}
        if trace := self._trace(record):
            shown["exception"] = trace
        return json.dumps(_encodable(shown), separators=(",", ":"))  # ASCII: no reader finds another line's end in it


def on_one_line(text: str) -> str:
    """The text with its control characters and line ends as escapes: what strangers send cannot look like a line of
    ours, nor move a terminal's cursor."""
    return text if text.isprintable() else "".join(c if c.isprintable() else _escape(c) for c in text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()


def _message(record: logging.LogRecord) -> str:
    try:
        text = record.getMessage()
    except (TypeError, ValueError):  # a mistake in a log call must not end the work that logs
        text = f"{record.msg} {record.args!r}"
    return text if len(text) <= MAX_CHARS else text[:MAX_CHARS] + " ..."


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    return {**(CONTEXT.get() or {}), **getattr(record, "fields", {})}


def _field_text(value: object) -> str:
    text = str(value)
    if type(value) in (int, float):
        return text
    return text if _PLAIN.fullmatch(text) else '"' + on_one_line(text.replace("\\", "\\\\").replace('"', '\\"')) + '"'


def _encodable(shown: dict[str, Any]) -> dict[str, Any]:
    """Half of a surrogate pair is no UTF-8."""
    return {name: value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value
            for name, value in shown.items()}


def _log_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int,
                 file: TextIO | None = None, line: str | None = None) -> None:
    logging.getLogger("py.warnings").warning("%s: %s (%s:%d)", category.__name__, message, filename, lineno)


def _log_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
    else:
        logging.getLogger("xllm").critical("uncaught exception", exc_info=(kind, error, trace))


def _log_thread_exception(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is not None and not isinstance(args.exc_value, SystemExit):
        logging.getLogger("xllm").error("uncaught exception in thread %s", getattr(args.thread, "name", "?"),
                                        exc_info=(args.exc_type, args.exc_value, args.exc_traceback))
