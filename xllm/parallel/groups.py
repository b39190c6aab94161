"""`Group`: the processes that share each layer's tensors, and the sums and gathers among them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import (  # what torch.distributed exports, with types
    FileStore,
    PrefixStore,
    Store,
    TCPStore,
)

from backends.backend import Backend
from backends.cuda_one_shot import OneShot, obstacle
from xllm.errors import ConfigError, WorkerError

_log = logging.getLogger(__name__)

# The older name warns where there is the newer one, from torch 2.13 on.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


# Of a rank's numbers up to which gloo sums are made in one shot. Measured on two cores with two ranks: 0.5 to 0.8 ms
# instead of 1.2 to 1.7 up to here, and no faster beyond.
ONE_SHOT_BYTES = 256 * 2**10


class ExchangeWatch(Protocol):
    """What stands between a group and its exchanges where steps are checked, see `Group.watch`."""

    def exchange(self, what: str, make: Callable[[], None], stand_in: Callable[[], None]) -> None:
        """Call `make`, which exchanges, or `stand_in`, which writes numbers of the same shape without the others: while
        a step is recorded, as in a device's capture, which exchanges nothing either. what: kind, dtype and shape."""
        ...


class Group:
    """Made by `open_group`. Used by one thread; all ranks call the same functions in the same order.

    On an accelerator the calls queue work on the current stream and return, so they can be captured into graphs. A rank
    that dies or does something else makes the others fail, at the latest when the group's timeout has passed: with an
    error here or where they next wait for the device, or by the end of the process, as torch.distributed decides.
    """

    def __init__(self, rank: int, size: int, inner: dist.ProcessGroup | None, *, store: Store | None = None,
                 timeout_s: float = 0.0, one_shot_bytes: int = 0):
        """inner: None: alone. store: where all can leave notes; not needed alone. one_shot_bytes: see
        `ONE_SHOT_BYTES`."""
        self.rank, self.size, self._timeout_s = rank, size, timeout_s
        self._inner, self._store, self._num_votes = inner, store, 0
        self._one_shot_bytes = one_shot_bytes
        self._one_kernel: OneShot | None = None  # of a device, for small sums
        self.watch: ExchangeWatch | None = None  # set by a capturer that checks
        self._since_s: float | None = None  # when the exchange that is on the way began

    @property
    def waiting_s(self) -> float:
        """For how long the exchange that is on the way has waited; 0.0: there is none. Any thread may ask."""
        since_s = self._since_s
        return 0.0 if since_s is None else time.monotonic() - since_s

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over all ranks, in place; returns x. Contiguous, of one shape and dtype everywhere. Bit for bit the
        same on all ranks."""
        if self._one_kernel is not None and self._one_kernel.takes(x):
            self._one_kernel.all_reduce(x)
        elif self._inner is not None:
            how = (_gather_and, torch.add, x) if self._is_small(x) else (dist.all_reduce, x)
            self._exchange("all_reduce", x, lambda: None, *how)
        return x

    def sum_in_one_kernel(self, device: torch.device) -> None:
        """Let `all_reduce` sum small tensors so, if all ranks' devices can. Called by all ranks, before any graph."""
        why_not = obstacle(self.size)
        cannot = torch.tensor([bool(why_not)], dtype=torch.int32, device=device)
        if self._inner is not None and not self.all_reduce_max(cannot).item():
            self._one_kernel = OneShot(self._inner, device, self.size)
        else:
            _log.info("small sums go through NCCL too: %s", why_not or "another rank's device cannot do more")

    def all_reduce_max(self, x: Tensor) -> Tensor:
        """The largest over all ranks, number by number, in place; returns x. As `all_reduce`; what a NaN on one rank
        gives on the others is open."""
        if self._inner is not None and self._is_small(x):
            self._exchange("all_reduce_max", x, lambda: None, _gather_and, torch.maximum, x)
        elif self._inner is not None:
            self._exchange("all_reduce_max", x, lambda: None, dist.all_reduce, x, op=dist.ReduceOp.MAX)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """x [..., D] of all ranks, in the order of their ranks: [..., size * D]. Of one shape and dtype everywhere.

        A new tensor, or x itself if there is one rank only.
        """
        if self._inner is None:
            return x
        parts = x.new_empty(self.size * len(x), *x.shape[1:])  # one after the other, which all backends know
        parts_NX = parts.view(self.size, *x.shape)
        self._exchange("all_gather", x, lambda: _repeat(x, parts_NX), _all_gather, parts, x.contiguous())
        return parts_NX.movedim(0, -2).flatten(-2)

    def vote(self, topic: str, ballot: str, within_s: float | None = None) -> list[str]:
        """Tell the others something; returns what all ranks had to tell, in their order, this one included.

        No exchange: ranks that are in the middle of one, or of a capture, are not disturbed. All ranks hold the same
        votes in the same order. Raises WorkerError if some have not voted on the topic in time (None: the time of an
        exchange).
        """
        if self._inner is None:
            return [ballot]
        assert self._store is not None
        keys, patience_s = self.cast(topic, ballot), self._timeout_s if within_s is None else within_s
        try:
            self._store.wait(keys, timedelta(seconds=patience_s))
        except RuntimeError as error:
            missing = ", ".join(str(rank) for rank, key in enumerate(keys) if not self._store.check([key]))
            raise WorkerError(f"worker rank {missing} has not voted on {topic} within {patience_s:g} s") from error
        return [self._store.get(key).decode() for key in keys]

    def cast(self, topic: str, ballot: str) -> list[str]:
        """Take part in a vote without waiting for its outcome; returns the names of all ranks' ballots."""
        if self._store is None:
            return []
        self._num_votes += 1
        keys = [f"vote/{self._num_votes}/{topic}/{rank}" for rank in range(self.size)]
        self._store.set(keys[self.rank], ballot)
        return keys

    def _is_small(self, x: Tensor) -> bool:
        """Whether all numbers of all ranks are better fetched at once than reduced on their way."""
        return x.nbytes <= self._one_shot_bytes

    def _exchange(self, name: str, x: Tensor, stand_in: Callable[[], None], collective: Callable[..., object],
                  *arguments: Any, **options: Any) -> None:
        def make() -> None:
            self._since_s = time.monotonic()
            try:
                collective(*arguments, group=self._inner, **options)
                self._since_s = None
            except RuntimeError as error:
                raise RuntimeError("another rank of the group has ended, or has not done the same within "
                                   f"{self._timeout_s:g} s: {error}") from error

        if self.watch is None:
            make()
        else:
            self.watch.exchange(f"{name} of {x.dtype} {list(x.shape)}", make, stand_in)

    def close(self) -> None:
        """Leave the group. All ranks do so once their work is done; none waits for the others."""
        if self._inner is not None:
            inner, self._inner, self._one_kernel = self._inner, None, None
            dist.destroy_process_group(inner)


def _gather_and(combine: Callable[..., Tensor], x: Tensor, *, group: dist.ProcessGroup) -> None:
    """A one-shot reduction, in place: the others' numbers come in one exchange instead of two, and every rank combines
    them in the order of the ranks."""
    parts = x.new_empty(group.size() * x.numel())
    _all_gather(parts, x.view(-1), group=group)
    first, second, *others = parts.view(-1, *x.shape)
    combine(first, second, out=x)
    for part in others:
        combine(x, part, out=x)


def _repeat(x: Tensor, parts_NX: Tensor) -> None:
    parts_NX.copy_(x.expand_as(parts_NX))


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
    group = Group(rank, size, dist.group.WORLD, store=PrefixStore("notes", meeting), timeout_s=timeout_s,
                  one_shot_bytes=ONE_SHOT_BYTES if backend.computes_on_host else 0)
    try:
        group.all_reduce(torch.ones(1, dtype=torch.int32, device=backend.device)).item()
        if backend.collectives == "nccl" and not store.startswith("store://"):  # that is of several machines
            group.sum_in_one_kernel(backend.device)
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
