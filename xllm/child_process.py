"""Functions shared by the processes of ours that start other processes of ours."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import tempfile
import threading
from pathlib import Path
from typing import NoReturn

from xllm import run_child

MAX_UNIX_PATH = 100  # sun_path holds 108 bytes on Linux, 104 elsewhere


def run_module(name: str) -> list[str]:
    """Arguments of Python that run a module of ours in a process of its own, as `-m` would; see `run_child`."""
    return [run_child.__file__, name]


def socket_folder(prefix: str, longest_name: str) -> Path:
    """A new folder for unix sockets, of mode 0700: nobody else can reach them. longest_name: of a socket in it."""
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    if len(str(folder / longest_name)) > MAX_UNIX_PATH:
        folder.rmdir()
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir="/tmp"))
    return folder


def end_with_parent(folder: Path) -> None:
    """End this process, and remove `folder`, when stdin ends: the parent keeps it open for as long as it lives."""
    threading.Thread(target=_watch, args=(folder,), name="parent-watch", daemon=True).start()


def _watch(folder: Path) -> None:
    while sys.stdin.buffer.read(4096):
        pass
    shutil.rmtree(folder, ignore_errors=True)  # nobody else is left to do it
    os._exit(1)


def exit_at_once(code: int) -> NoReturn:
    """End this process: a step that hangs in a native thread must not keep it alive."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
