"""Errors as messages: `Failed` holds an error's class and text."""

from __future__ import annotations

import builtins

from xllm import errors
from xllm.worker.messages import Failed


def as_failed(error: BaseException) -> Failed:
    """An error as a message."""
    return Failed(type(error).__name__, str(error))


def as_error(failed: Failed) -> Exception:
    """The error again: of the class that it had if that is one of ours or of Python's, else a RuntimeError that names
    it."""
    found = getattr(errors, failed.kind, None) or getattr(builtins, failed.kind, None)
    if isinstance(found, type) and issubclass(found, Exception):
        try:
            return found(failed.message)
        except TypeError:  # it is made of more than a message
            pass
    return RuntimeError(f"{failed.kind}: {failed.message}")
