"""Every error that xLLM raises on purpose.

    XllmError
    ├── ConfigError        a setting, flag or pair of features is wrong: raised before anything starts
    ├── RequestError       a request is wrong: names the field, never harms another request
    ├── ModelError         a checkpoint is wrong: names the file or tensor, raised before serving
    ├── EngineStateError   the engine cannot do that now: it sleeps, or has open requests
    ├── EngineDeadError    the engine stopped; every open request ends with this
    ├── WorkerError        a worker process ended, does not go on or differs: the engine ends, and is restarted
    ├── DeviceError        a device, its driver or one of its libraries is missing or failed
    ├── TransferError      another process's memory cannot be written: what was to come is computed there
    └── DiskError          the KV store's disk failed: serving goes on without that tier

The first three are also `ValueError`s: they say that the caller must change something.
Broken invariants of our own are `assert`s or `IntegrityError`, never one of these.
"""


# Chosen: a screenful; a message may quote a checkpoint's or a caller's text, which has no bound.
MAX_MESSAGE_CHARS = 2000


def shortened(text: str) -> str:
    """The text if it has at most MAX_MESSAGE_CHARS; else its beginning and end, with a mark between."""
    half = MAX_MESSAGE_CHARS // 2
    return text if len(text) <= MAX_MESSAGE_CHARS else f"{text[:half]} [...] {text[-half:]}"


def shown_error(error: BaseException) -> str:
    """The error's class and message, on one line."""
    return f"{type(error).__name__}: {error}"


def needs_traceback(error: BaseException) -> bool:
    """Whether the log should have the error's traceback. Not for errors raised on purpose, whose message says all, nor
    for a worker's, which are logged where they happened."""
    return not isinstance(error, XllmError) and not getattr(error, "of_worker", False)


class XllmError(Exception):
    """Root of the tree; catching it catches all that is raised on purpose."""


class ConfigError(XllmError, ValueError):
    """A setting is unknown, out of range, or does not go with another one."""


class RequestError(XllmError, ValueError):
    """A request cannot be served as it stands; `field` names the parameter at fault."""

    def __init__(self, message: str, *, field: str | None = None):
        super().__init__(message)
        self.field = field


class ModelError(XllmError, ValueError):
    """A checkpoint, its config or its tokenizer cannot be used. A long message is cut in the middle: it may quote
    whatever a stranger wrote."""

    def __init__(self, message: str):
        super().__init__(shortened(message))


class EngineStateError(XllmError):
    """What was asked of the engine does not go with the state that it is in."""


class EngineDeadError(XllmError):
    """The engine is gone; the message says why."""


class WorkerError(XllmError):
    """A worker process ended, fell silent, stays behind the others or does something else; the message says which and
    how."""


class DeviceError(XllmError):
    """A device or one of its libraries is not usable here."""


class DiskError(XllmError, OSError):
    """The disk below the KV store failed; `errno` and `filename` as in any OSError."""


class TransferError(XllmError):
    """KV could not be sent to another instance, or taken from it; the message says why."""


class IntegrityError(AssertionError):
    """A self-audit (`check_integrity`) found a broken invariant: a bug of ours."""
