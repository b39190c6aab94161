"""`Group`: the processes that share each layer's tensors, and the sums and gathers among them."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FileStore, Store, TCPStore  # what torch.distributed exports, with types

from backends.backend import Backend
from xllm.errors import ConfigError

# The older name warns where there is the newer one, from torch 2.13 on.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Group:
    """Made by `open_group`. Used by one thread; all ranks call the same functions in the same order.

    On an accelerator the calls queue work on the current stream and return, so they can be captured into graphs. A rank
    that dies or does something else makes the others fail, at the latest when the group's timeout has passed: with an
    error here or where they next wait for the device, or by the end of the process, as torch.distributed decides.
    """

    def __init__(self, rank: int, size: int, inner: dist.ProcessGroup | None, *, timeout_s: float = 0.0):
        self.rank, self.size, self._timeout_s = rank, size, timeout_s
        self._inner = inner  # None: alone

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over all ranks, in place; returns x. Contiguous, of one shape and dtype everywhere. Bit for bit the
        same on all ranks."""
        if self._inner is not None:
            self._exchange(dist.all_reduce, x)
        return x

    def all_reduce_max(self, x: Tensor) -> Tensor:
        """The largest over all ranks, number by number, in place; returns x. As `all_reduce`; what a NaN on one rank
        gives on the others is open."""
        if self._inner is not None:
            self._exchange(dist.all_reduce, x, op=dist.ReduceOp.MAX)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """x [..., D] of all ranks, in the order of their ranks: [..., size * D]. Of one shape and dtype everywhere.

        A new tensor, or x itself if there is one rank only.
        """
        if self._inner is None:
            return x
        parts = x.new_empty(self.size * len(x), *x.shape[1:])  # one after the other, which all backends know
        self._exchange(_all_gather, parts, x.contiguous())
        return parts.view(self.size, *x.shape).movedim(0, -2).flatten(-2)

    def _exchange(self, collective: Callable[..., object], *arguments: Any, **options: Any) -> None:
        try:
            collective(*arguments, group=self._inner, **options)
        except RuntimeError as error:
            raise RuntimeError("another rank of the group has ended, or has not done the same within "
                               f"{self._timeout_s:g} s: {error}") from error

    def close(self) -> None:
        """Leave the group. All ranks do so once their work is done; none waits for the others."""
        if self._inner is not None:
            inner, self._inner = self._inner, None
            dist.destroy_process_group(inner)


ALONE = Group(0, 1, None)  # one rank: its collectives return what they are given


def open_group(backend: Backend, *, rank: int, size: int, store: str, timeout_s: float,
               meet_s: float | None = None) -> Group:
    """Join the group of `size` processes that meet at `store`; returns when all are there and have exchanged something.

    store: `tcp://HOST:PORT`, where rank 0 listens, `store://HOST:PORT` of a TCPStore that is there already, or
    `file:///PATH` of a file that is not there yet, for processes of one machine. timeout_s: how long one exchange may
    take, this first one included. meet_s: for how long the others are waited for; None: as long as for an exchange. A
    process has one group at a time.
    Devices compile, allocate or connect at the first exchange, which a graph could not capture: it is done here.

    Raises:
        ConfigError: a rank outside `size`, a store of another kind, processes that were given other sizes.
        RuntimeError: the others did not come in time, or their devices do not reach one another.
    """
    if size < 1 or not 0 <= rank < size:
        raise ConfigError(f"rank {rank} is outside a group of {size}")
    if size == 1:
        return Group(rank, size, None)
    timeout = timedelta(seconds=timeout_s)
    patience = timeout if meet_s is None else timedelta(seconds=meet_s)
    meeting = _open_store(store, is_first=rank == 0, size=size, timeout=patience)
    _meet(meeting, rank=rank, size=size, timeout=patience)
    dist.init_process_group(backend.collectives, store=meeting, rank=rank, world_size=size, timeout=timeout)
    group = Group(rank, size, dist.group.WORLD, timeout_s=timeout_s)
    try:
        group.all_reduce(torch.ones(1, dtype=torch.int32, device=backend.device)).item()
    except BaseException:
        group.close()
        raise
    return group


def _open_store(url: str, *, is_first: bool, size: int, timeout: timedelta) -> Store:
    kind, _, place = url.partition("://")
    host, _, port = place.rpartition(":")
    if kind == "file" and place.startswith("/"):
        return FileStore(place, size)
    if kind in ("tcp", "store") and host and port.isdigit():
        return TCPStore(host.strip("[]"), int(port), is_master=is_first and kind == "tcp", timeout=timeout,
                        wait_for_workers=False)
    raise ConfigError(f"a group meets at tcp://HOST:PORT, store://HOST:PORT or file:///PATH, got {url!r}")


def _meet(store: Store, *, rank: int, size: int, timeout: timedelta) -> None:
    """Wait for all before any device does: how long a device's library waits is not ours to say."""
    store.set(f"size/{rank}", str(size))
    keys = [f"size/{other}" for other in range(size)]
    try:
        store.wait(keys, timeout)
    except RuntimeError as error:
        missing = [other for other, key in enumerate(keys) if not store.check([key])]
        raise RuntimeError(f"ranks {missing} of {size} did not come within {timeout.total_seconds():g} s") from error
    sizes = [int(store.get(key)) for key in keys]
    if set(sizes) != {size}:
        raise ConfigError(f"a group whose ranks were given the sizes {sizes}")
