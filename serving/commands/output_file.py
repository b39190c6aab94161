"""Checks the path of a file that a command is going to write, before anything is computed or written, and locks it.

A command that notices at its end that it cannot write has wasted its run; one that writes over a file that it reads
has destroyed it.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from xllm.errors import ConfigError

logger = logging.getLogger("xllm.output")


def check_output(output: Path, reads: Iterable[Path] = ()) -> None:
    """Raise ConfigError unless `output` can be written and is none of the files that the command reads.

    reads: files, and folders of which every file counts; what does not exist is passed over. Files are compared by
    device and inode, so no spelling of a path, link or letter case hides that two are the same.
    """
    if output.is_dir():
        raise ConfigError(f"{output} is a folder, not a file to write")
    if not output.parent.is_dir():
        raise ConfigError(f"{output} cannot be written: there is no folder {output.parent}")
    if not os.access(output if output.exists() else output.parent, os.W_OK):
        raise ConfigError(f"{output} cannot be written: no permission")
    if output.exists() and (read := find_same(output, reads)) is not None:
        raise ConfigError(f"{output} is the same file as {read}, which is read: name another output")


@contextlib.contextmanager
def open_locked(output: Path) -> Iterator[BinaryIO]:
    """Open a file to append to, without a buffer; it is created if it is not there. No other process has it open in
    this way.

    The lock is a flock, which the kernel drops with the process. Raises ConfigError if another process has it.
    """
    try:
        file = output.open("ab", buffering=0)
    except OSError as error:
        raise ConfigError(f"{output} cannot be written: {error.strerror}") from None
    with file:
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # a terminal or pipe takes turns by itself
            _lock(file, output)
        yield file


@contextlib.contextmanager
def replace_locked(output: Path, lines: Iterable[bytes]) -> Iterator[BinaryIO]:
    """The file `output`, which the caller has locked and keeps open, with `lines` alone in it, open and locked as by
    `open_locked`. Interrupted at any moment, the file is either as it was or has exactly these lines.

    A link is followed; another name of the same file (a hard link) keeps the old contents. Raises ConfigError.
    """
    final = output.resolve()
    partial = final.with_name(f".{final.name}.partial")  # one name: what an interrupted run left goes away
    try:
        partial.unlink(missing_ok=True)
        file = partial.open("xb", buffering=0)  # which follows no link
    except OSError as error:
        raise ConfigError(f"{output} has lines to replace, and {partial} cannot be written: {error.strerror}") from None
    with file:
        try:
            _lock(file, output)
            with partial.open("wb") as writer:  # the same file, with a buffer
                writer.writelines(lines)
                writer.flush()
                os.fsync(writer.fileno())
            shutil.copymode(final, partial)
            partial.replace(final)
            file.seek(0, os.SEEK_END)
        except OSError as error:
            raise ConfigError(f"{output} has lines to replace, and cannot be: {error.strerror}") from None
        yield file


def _lock(file: BinaryIO, output: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(f"another process is writing to {output}: wait for its end, or name another "
                          "output") from None
    except OSError as error:
        logger.warning("%s cannot be locked (%s): see to it that nothing else writes to it", output, error.strerror)


def find_same(output: Path, reads: Iterable[Path]) -> Path | None:
    """The one among `reads` (see `check_output`) that is the existing file `output`."""
    for read in _files(reads):
        try:
            if output.samefile(read):
                return read
        except OSError:  # gone, a broken link, or a name that is too long
            continue
    return None


def _files(paths: Iterable[Path]) -> Iterator[Path]:
    for path in paths:
        if os.path.isdir(path):
            yield from (Path(folder) / name for folder, _, names in os.walk(path) for name in names)
        else:
            yield path
