"""Streams of a device that have one owner each, and `CopyStreams`: those on which threads copy to and from the host.

`device_module` is torch.cuda or torch.npu.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from weakref import WeakSet

import torch

# How many streams torch makes for a device and priority (c10's StreamPool); it hands them out in turn, again and again.
RING_SIZE = 32

_LOCK = threading.Lock()
_OWNED: WeakSet[Any] = WeakSet()


def own_stream(device_module: Any, device: torch.device) -> Any:
    """A stream that no other caller has got from here, for as long as the returned object lives. A new object of
    torch's may be a stream that somebody uses already: their work would then wait for the caller's, or be part of the
    caller's capture. When all streams have an owner, one is shared."""
    with _LOCK:
        for _ in range(RING_SIZE):
            stream = device_module.Stream(device)
            if stream not in _OWNED:
                break
        _OWNED.add(stream)
        return stream


class CopyStreams:
    """One stream for each thread that copies. using: entered while a thread touches the device."""

    def __init__(self, device_module: Any, device: torch.device, *,
                 using: Callable[[], AbstractContextManager[None]] = nullcontext):
        self._module, self._device, self._using = device_module, device, using
        self._local = threading.local()

    def current(self) -> Any:
        """This thread's stream. The first use makes the device current in the thread."""
        if not hasattr(self._local, "stream"):
            self._module.set_device(self._device)
            self._local.stream = own_stream(self._module, self._device)
        return self._local.stream

    def queued(self, op: Callable[..., None]) -> Callable[..., None]:
        """A function that runs `op` on this thread's stream, after what the default stream has queued."""

        def run(*arguments: Any, **options: Any) -> None:
            with self._using():
                stream = self.current()
                stream.wait_stream(self._module.default_stream(self._device))
                with self._module.stream(stream):
                    op(*arguments, **options)

        return run

    def synchronize(self) -> None:
        """Wait until what this thread has queued is done."""
        with self._using():
            self.current().synchronize()
