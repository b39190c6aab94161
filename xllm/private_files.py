"""Checks that files and folders are out of the reach of other users of this machine: owners and permission bits."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from xllm.errors import ConfigError

OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
OTHERS_ACCESS = stat.S_IRWXG | stat.S_IRWXO


def open_private_folder(path: Path) -> int:
    """A descriptor of the folder, created (with what is missing above it, mode 0700) if it is not there.

    Raises ConfigError, naming the folder, its mode and the remedy, unless it belongs to this user or to root, only its
    owner may write to it, and none of the folders above lets everybody rename or delete it. Other errors are OSError.
    """
    _make(path)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _check_folder(path, os.fstat(fd))
        for above in dict.fromkeys([*path.absolute().parents, *path.resolve().parents]):
            _check_above(path, above, above.stat())
    except BaseException:
        os.close(fd)
        raise
    return fd


def _make(path: Path) -> None:
    for folder in reversed([path, *path.absolute().parents]):
        try:
            os.mkdir(folder, 0o700)
        except FileExistsError:
            continue
        except OSError:
            if not folder.is_dir():  # a root on a read-only disk is there, and says something else
                raise


def _check_folder(path: Path, found: os.stat_result) -> None:
    if found.st_uid not in (0, os.geteuid()):
        raise ConfigError(f"the folder {path} belongs to user {found.st_uid}, who can plant files in it: chown it to "
                          f"user {os.geteuid()}, or name another folder")  # fmt: skip
    if found.st_mode & OTHERS_WRITE:
        raise ConfigError(f"the folder {path} has mode {mode_text(found)}: {_who_writes(found)} can plant files in it; "
                          f"chmod go-w {path}, or name a folder in it that is not there yet: it is created for this "
                          "user alone")  # fmt: skip


def _check_above(path: Path, above: Path, found: os.stat_result) -> None:
    if found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX:
        raise ConfigError(f"the folder {above}, above {path}, has mode {mode_text(found)}: every user can put another "
                          f"folder in the place of what lies in it; chmod o-w {above} (or +t)")  # fmt: skip


def _who_writes(found: os.stat_result) -> str:
    return "every user" if found.st_mode & stat.S_IWOTH else f"group {found.st_gid}"


def is_own_file(found: os.stat_result) -> bool:
    """A regular file of this user or root, under one name alone, that nobody else may write to."""
    return (stat.S_ISREG(found.st_mode) and found.st_uid in (0, os.geteuid()) and found.st_nlink == 1
            and not found.st_mode & OTHERS_WRITE)  # fmt: skip


def read_secret(name: str, path: Path, max_bytes: int) -> bytes:
    """The bytes of a file that only its owner, this user or root, may read or write; root's may be read by its group.

    name: of the setting. Raises ConfigError if it is not that, cannot be read, or is longer than `max_bytes`.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO would wait for its writer
        with os.fdopen(fd, "rb") as file:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode):
                raise ConfigError(f"{name} {path} is no regular file")
            if found.st_uid not in (0, os.geteuid()):
                raise ConfigError(f"{name} {path} belongs to user {found.st_uid}: chown it to user {os.geteuid()}")
            allowed = stat.S_IRGRP if found.st_uid == 0 else 0  # as secrets are mounted into containers
            if found.st_mode & OTHERS_ACCESS & ~allowed:
                raise ConfigError(f"{name} {path} has mode {mode_text(found)}: others can read or write it; "
                                  f"chmod 600 {path}")  # fmt: skip
            content = file.read(max_bytes + 1)
    except OSError as error:
        raise ConfigError(f"{name} {path} cannot be read: {error.strerror}") from None
    if len(content) > max_bytes:
        raise ConfigError(f"{name} {path} is longer than {max_bytes} bytes")
    return content


def check_not_everybodys(name: str, path: Path) -> None:
    """Raise ConfigError if every user may write to a file on which keys rest. name: of the setting."""
    found = path.stat()
    if found.st_mode & stat.S_IWOTH:
        raise ConfigError(f"{name} {path} has mode {mode_text(found)}: every user can change it; chmod go-w {path}")


def exposure_of(path: Path, *, is_secret: bool) -> str | None:
    """What users beside the owner can do with a file on which keys rest, with the remedy, for a warning; None: nothing.

    is_secret: its content is, so that reading counts too; a file of root's may be read by its group all the same.
    """
    found = path.stat()
    if found.st_mode & OTHERS_WRITE:
        return f"has mode {mode_text(found)}: others can change it; chmod go-w {path}"
    readers = stat.S_IROTH if found.st_uid == 0 else stat.S_IROTH | stat.S_IRGRP
    if is_secret and found.st_mode & readers:
        return f"has mode {mode_text(found)}: others can read it; chmod 600 {path}"
    return None


def mode_text(found: os.stat_result) -> str:
    return f"{stat.S_IMODE(found.st_mode):04o}"
