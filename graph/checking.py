"""`CheckingCapturer`: graph mode without a device. A captured function is recorded, and replayed by calling it again,
in memory that has been poisoned, with everything checked that a real graph would get wrong in silence.

A real graph has the addresses, the launches and the host's numbers of its capture baked in. So this one raises
`GraphCheckError` if

- an input or output tensor lies elsewhere than when it was captured;
- an operator reads memory that was neither there at the capture nor made in this call;
- the operators but views are not those of the capture, in that order (the function looked at something on the host);
- an operator reads a number back to the host;
- the exchanges with other ranks are not those of the capture, or one is made outside of the captured function while
  its step is on the way;
- an input holds what the last replay left: it was not filled, or not wholly;
- a row of an output that is no padding was not written, or what stands in padding rows made a difference to it.

Between replays inputs, their twins on the host, outputs and whatever the function allocated and somebody still holds
are poisoned. During one, fresh memory is poisoned before an operator gets it. A step with padding runs twice, the first
time with NaN in the padding rows of whatever is looked up by an integer input (embeddings, rotations), which then runs
through all their activations: the outputs of other rows must not differ by a bit. Kernels called past torch's
dispatcher are not seen themselves; what they read and write is.

A device's capture exchanges nothing, so this one's does not either: it can fail on one rank alone.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from backends.backend import GraphMemory
from graph.buffers import StepMemory

# By itemsize: as floats they are NaNs that no arithmetic makes, as integers huge.
POISON = {1: 0x65, 2: 0x7FDE, 4: 0x7FC0DEAD, 8: 0x7FF8DEADDEADDEAD}
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
UNINITIALISED = {"aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty_strided"}
ARRANGES = {"aten::clone", "aten::_unsafe_view", "aten::_reshape_copy"}
LITERAL = "aten::lift_fresh"  # of no axis: a number in the code
READS_BACK = {"aten::_local_scalar_dense", "aten::item"}
TOKENS = "T"  # the axis whose padding rows are poisoned inside


class GraphCheckError(AssertionError):
    """A captured step that a real graph would replay wrongly."""


def poison(tensor: Tensor) -> None:
    """Overwrite a tensor with values that must never be read."""
    if tensor.numel():
        _bits(tensor).fill_(POISON[tensor.itemsize])


def poisoned(tensor: Tensor) -> bool:
    """Whether any number of a tensor is the poison."""
    return bool((_bits(tensor) == POISON[tensor.itemsize]).any())


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(BITS[tensor.itemsize])


class CheckedPool:
    """Stands for the memory that graphs share: what one replay allocated is overwritten by the next."""

    def __init__(self) -> None:
        self._alive: list[weakref.ref[Tensor]] = []

    def lend(self, tensors: list[weakref.ref[Tensor]]) -> None:
        self._alive += tensors

    def overwrite(self) -> None:
        for reference in self._alive:
            if (tensor := reference()) is not None:
                poison(tensor)
        self._alive = []


class CheckingCapturer:
    """A `Capturer`. num_replays counts over all its graphs, exchanges are those that a captured function made last.

    It can watch the exchanges of a group of ranks (`exchange`, as `xllm/parallel/groups.py:ExchangeWatch` has it).

    plans_in_graph is False, as on Ascend: attention's parameters are made anew before each replay.
    """

    plans_in_graph = False
    pad_slot = -1
    pad_block = 0

    def __init__(self, *, bucket_step: int = 16, max_streams: int | None = None):
        self.bucket_step, self.max_streams = bucket_step, max_streams
        self.num_replays = 0
        self.exchanges: list[str] = []
        self._watch: _Watch | None = None  # of the function that is being called
        self._between = ""  # what is done for a step outside of its function
        self._thread = 0  # that calls the function

    def make_pool(self) -> CheckedPool:
        return CheckedPool()

    def capture(self, function: Callable[[], None], *, pool: Any, memory: GraphMemory) -> CheckedGraph:
        assert isinstance(memory, StepMemory)
        return CheckedGraph(self, function, pool, memory)

    def fence(self) -> Callable[[], None]:
        return lambda: None

    def exchange(self, what: str, make: Callable[[], None], stand_in: Callable[[], None]) -> None:
        """Note an exchange and make it, or let it stand in while a function is captured."""
        if self._between:
            raise GraphCheckError(f"{what} while {self._between}: a replay would not make it")
        if self._watch is None:  # of an eager step
            make()
            return
        if threading.get_ident() != self._thread:
            raise GraphCheckError(f"{what} in another thread, during a replay that does not have it")
        self._watch.operators.append(what)
        self.exchanges.append(what)
        with _disable_current_modes():  # what it is made of is not the graph's
            (stand_in if self._watch.records else make)()

    @contextmanager
    def watching(self, watch: _Watch) -> Iterator[None]:
        """While a captured function is called."""
        self._watch, self._thread, self.exchanges = watch, threading.get_ident(), []
        try:
            with watch:
                yield
        finally:
            self._watch = None

    @contextmanager
    def no_exchange(self, while_: str) -> Iterator[None]:
        """While something is done on the host for a step that is to be replayed."""
        self._between = while_
        try:
            yield
        finally:
            self._between = ""


class CheckedGraph:
    """A `CapturedGraph`. num_bytes: all that one call allocates."""

    num_streams = 1

    def __init__(self, capturer: CheckingCapturer, function: Callable[[], None], pool: CheckedPool, memory: StepMemory):
        self._capturer, self._function, self._pool, self._memory = capturer, function, pool, memory
        self._addresses = _addresses(memory)
        self._released = False
        watch = self._run(None)
        self._operators, self._constants = watch.operators, watch.outside
        self.num_bytes = watch.num_bytes

    def replay(self) -> None:
        if self._released:
            raise GraphCheckError("the graph was released")
        for name, address in _addresses(self._memory).items():
            if address != self._addresses.get(name):
                raise GraphCheckError(f"{name} has moved since the capture")
        self._capturer.num_replays += 1
        self._pool.overwrite()
        disturbed = self._disturbed_outputs()
        self._compare(self._run(self._constants).operators)
        for name, bits in disturbed.items():
            if not torch.equal(bits, _bits(self._memory.live_output(name))):
                raise GraphCheckError(f"{name}: padding leaked into it")
        for tensor in (*self._memory.inputs.values(), *self._memory.hosts.values()):
            poison(tensor)

    def release(self) -> None:
        self._released = True

    def _disturbed_outputs(self) -> dict[str, Tensor]:
        """The bits of the live outputs with NaN in the padding; nothing where there is none."""
        memory = self._memory
        if memory.num_live[TOKENS] == memory.sizes[TOKENS]:
            return {}
        self._compare(self._run(self._constants, poison_padding=True).operators)
        return {name: _bits(memory.live_output(name)).clone() for name in memory.outputs}

    def _run(self, constants: set[int] | None, *, poison_padding: bool = False) -> _Watch:
        memory = self._memory
        for name in memory.inputs:
            if poisoned(memory.live_input(name)):
                raise GraphCheckError(f"{name} was not filled since the last replay")
        for output in memory.outputs.values():
            poison(output)
        watch = _Watch(memory, constants, poison_padding)
        with self._capturer.watching(watch):
            self._function()
        self._pool.lend(watch.made)
        if poison_padding:
            return watch
        for name in memory.outputs:
            if poisoned(memory.live_output(name)):
                raise GraphCheckError(f"{name}: a row was not written, or holds memory that never was")
        return watch

    def _compare(self, operators: list[Any]) -> None:
        if operators == self._operators:
            return
        for place, (now, then) in enumerate(zip(operators, self._operators)):
            if now != then:
                raise GraphCheckError(f"operator {place} is {now}, and was {then} at the capture")
        raise GraphCheckError(f"{len(operators)} operators, and {len(self._operators)} at the capture")


class _Watch(TorchDispatchMode):
    """Sees each operator of one call.

    constants: addresses of the storages that the function may read without having made them; None: all, noted in
    `outside`. made: the tensors that it made.
    """

    def __init__(self, memory: StepMemory, constants: set[int] | None, poison_padding: bool):
        super().__init__()
        self._constants, self._poison_padding = constants, poison_padding
        inputs = [t for t in memory.inputs.values() if t.ndim == 1 and not t.is_floating_point()]
        # By address, and held until the call ends: memory that was freed would be another tensor's.
        self._lookups = {tensor.data_ptr(): tensor for tensor in inputs}
        self._num_tokens, self._num_live = memory.sizes[TOKENS], memory.num_live[TOKENS]
        self.operators: list[Any] = []
        self.outside: set[int] = set()
        self.made: list[weakref.ref[Tensor]] = []
        self.num_bytes = 0
        self._own: set[int] = set()

    @property
    def records(self) -> bool:
        """Whether this is the capture, and no replay."""
        return self._constants is None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split(".")[0]
        if name in READS_BACK:
            raise GraphCheckError(f"{name}: a graph cannot give a number to the host")
        given = list(_tensors((args, kwargs or {})))
        for tensor in given:
            if tensor.ndim or name != LITERAL:
                self._note_read(name, _storage(tensor))
        out = func(*args, **(kwargs or {}))
        if not _only_arranges(func, name):
            self.operators.append(func)
        for tensor in _tensors(out):
            self._note_made(tensor)
            if name in UNINITIALISED:
                poison(tensor)
            elif self._poison_padding and self._is_lookup(given, tensor):
                poison(tensor[self._num_live:])
            elif self._is_index(given, tensor):
                self._lookups[tensor.data_ptr()] = tensor
        return out

    def _note_read(self, name: str, address: int) -> None:
        if not address or address in self._own:
            return
        if self._constants is None:
            self.outside.add(address)
        elif address not in self._constants:
            raise GraphCheckError(f"{name} reads memory that was not there at the capture")

    def _note_made(self, tensor: Tensor) -> None:
        address = _storage(tensor)
        known = self.outside if self._constants is None else self._constants
        if address in known:
            return
        if address not in self._own:
            self._own.add(address)
            self.num_bytes += tensor.untyped_storage().nbytes()
        self.made.append(weakref.ref(tensor))

    def _is_index(self, given: list[Tensor], result: Tensor) -> bool:
        """Whether it stands for an integer input from here on."""
        return (result.ndim == 1 and len(result) == self._num_tokens and not result.is_floating_point()
                and any(tensor.data_ptr() in self._lookups for tensor in given))

    def _is_lookup(self, given: list[Tensor], result: Tensor) -> bool:
        """Whether rows of numbers were looked up for the step's tokens."""
        return (result.is_floating_point() and result.ndim > 1 and len(result) == self._num_tokens > self._num_live
                and any(tensor.data_ptr() in self._lookups for tensor in given))


def _only_arranges(func: Any, name: str) -> bool:
    """Views, which launch nothing, and the copies that stand in for one where numbers have to be moved."""
    alias = func._schema.returns[0].alias_info if func._schema.returns else None
    return name in ARRANGES or (alias is not None and not alias.is_write)


def _addresses(memory: StepMemory) -> dict[str, tuple[int, torch.Size, torch.dtype]]:
    return {name: (tensor.data_ptr(), tensor.shape, tensor.dtype)
            for name, tensor in (*memory.inputs.items(), *memory.outputs.items())}


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tensors(values: Any) -> Iterator[Tensor]:
    """All tensors in nested lists, tuples and dicts."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        for value in values.values():
            yield from _tensors(value)
