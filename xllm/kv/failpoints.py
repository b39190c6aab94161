"""Named places in which a test lets a process die or an operation fail.

A site costs one attribute test while nothing is armed:

    if failpoints.armed is not None:
        failpoints.hit("disk.payload_written")

Armed by tests through `arm` and `disarm`, and in a child process through XLLM_FAILPOINTS, a comma-separated
list of `name=action[:n]`. An action is `kill` (SIGKILL to itself), the name of an errno (`ENOSPC`) to raise, or
a time (`50ms`) that the pass takes longer: at the n-th pass (default: the first) and, as a full, broken or slow disk
does, at every pass after it.
"""

from __future__ import annotations

import errno
import functools
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import NoReturn

from xllm.env import failpoints as failpoints_of_environment
from xllm.errors import ConfigError

NAMES = {
    "engine.add": "before a request that was checked is queued",
    "engine.step": "before a step is planned",
    "engine.settled": "a step's results are taken in, and nobody has heard of them",
    "disk.write": "before each pwrite of a block's header or payload, or of headers to be zeroed",
    "disk.read": "before each pread",
    "disk.allocate": "before a segment's space is allocated",
    "disk.sync": "before each fdatasync",
    "disk.header_invalidated": "the slot's header says that a write is under way; the payload is still the old one",
    "disk.payload_half": "half of the payload is written",
    "disk.payload_written": "the payload is written, the header is not",
    "disk.header_half": "half of the header is written",
    "disk.header_written": "the block is complete",
    "disk.erased": "the slot's header is zeroed",
    "disk.superblock_half": "a new segment has half of its superblock, under its temporary name",
    "disk.segment_created": "a new segment is complete under its temporary name",
    "disk.segment_renamed": "a new segment has its name",
    "disk.headers_dropped": "the headers that a segment about to grow or shrink has no payloads for are zeroed",
    "disk.segment_resized": "a segment has grown or shrunk to what the capacity says",
    "disk.segment_deleted": "a segment beyond the capacity is deleted",
    "store.segment_created": "a new segment of a shared store has its name",
    "store.payloads_written": "payloads of a shared store are written, their headers are not",
    "store.headers_half": "all headers of a batch but half of the last one are written",
    "store.headers_written": "the blocks are complete for every reader",
    "store.read": "before a block of a shared store is read",
    "store.list": "before a shared store is looked through for what is new",
    "tier.save_before": "before some of a path's blocks are copied from the device to host memory",
    "tier.saved": "they are copied, and not yet findable there",
    "tier.write_before": "before some of a path's blocks are written from host memory to disk",
    "tier.written": "they are written, and not yet findable there",
    "tier.published": "blocks copied down, to host memory or to disk, are findable there",
    "tier.read": "one block is read from disk into host memory, and not yet findable there",
    "tier.staged": "blocks read from disk are findable in host memory",
    "tier.load_begun": "the device blocks of a load are findable, and their bytes have not come",
    "tier.loaded_layer": "one layer of a load has come",
    "tier.loaded": "a load is complete, and what it held is given back",
    "transfer.put_begun": "a sender may write into a window's memory, and has not yet",
    "transfer.put_half": "half of a put's pieces are written",
    "tier.flush": "at shutdown, before one more path of the device is queued to be copied down",
}

FailAction = Callable[[], None]


class _Armed:
    def __init__(self, action: FailAction, first_pass: int):
        self.action = action
        self.first_pass = first_pass
        self.num_passes = 0


armed: dict[str, _Armed] | None = None  # None: nothing is, and no site looks any further
_lock = threading.Lock()


def hit(name: str) -> None:
    """Pass the point `name`: count it, and act if it is armed and its turn has come."""
    assert name in NAMES, name
    point = (armed or {}).get(name)
    if point is None:
        return
    with _lock:
        point.num_passes += 1
        due = point.num_passes >= point.first_pass
    if due:
        point.action()


def arm(name: str, action: str | FailAction, first_pass: int = 1) -> None:
    """From the `first_pass`-th pass on, `name` does `action`: `kill`, an errno's name, a time in ms, or a callable.

    Raises ConfigError for an unknown name or action. Passes are counted from here.
    """
    global armed
    if name not in NAMES:
        raise ConfigError(f"unknown failpoint {name!r}; there are {', '.join(NAMES)}")
    if first_pass < 1:
        raise ConfigError(f"failpoint {name}: passes are counted from 1, not from {first_pass}")
    made = _action(action) if isinstance(action, str) else action
    armed = {**(armed or {}), name: _Armed(made, first_pass)}


def arm_all(spec: str) -> None:
    """Arm a list as XLLM_FAILPOINTS holds it. Raises ConfigError where it cannot be read."""
    for item in filter(None, (part.strip() for part in spec.split(","))):
        name, equals, rest = item.partition("=")
        action, _, count = rest.partition(":")
        if not equals or (count and not count.isdecimal()):
            raise ConfigError(f"a failpoint is written name=action[:n], not {item!r}")
        arm(name, action, int(count or 1))


def disarm(name: str | None = None) -> None:
    """Disarm one point, or all of them."""
    global armed
    kept = {key: point for key, point in (armed or {}).items() if name is not None and key != name}
    armed = kept or None


def _action(word: str) -> FailAction:
    if word == "kill":
        return _kill
    if word.endswith("ms") and word[:-2].isdecimal():
        return functools.partial(time.sleep, int(word[:-2]) / 1000)
    number = getattr(errno, word, None)
    if not word.startswith("E") or not isinstance(number, int):
        raise ConfigError(f"a failpoint's action is `kill`, the name of an errno or a time like 50ms, not {word!r}")
    return lambda: _fail(number)


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _fail(number: int) -> NoReturn:
    raise OSError(number, os.strerror(number))


arm_all(failpoints_of_environment())
