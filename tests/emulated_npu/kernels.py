"""The device's kernels: the CPU's, on the device's memory, run or recorded where the stream is at.

Every PrivateUse1 kernel that the wheel registers for `aten` is replaced, except those that run nothing on the device
(allocation, views, metadata) and those whose C++ is wanted as it is (`.item()`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch_npu
from torch import Tensor

from tests.emulated_npu import runtime
from tests.emulated_npu.machine import Machine
from tests.emulated_npu.tasks import Kernel
from tests.emulated_npu.tensors import Range, as_meta, device_like, host, poison, range_of

NATIVE = frozenset(
    """
    _to_copy _has_compatible_shallow_copy_type _local_scalar_dense record_stream is_set_to storage_offset
    empty empty_like empty_quantized empty_strided new_empty new_empty_strided set_ resize_ resize_as_
    is_pinned pin_memory _pin_memory _copy_from _copy_from_and_resize
    _reshape_alias _unsafe_view alias as_strided as_strided_
    chunk detach diagonal expand imag lift lift_fresh narrow permute real
    select slice split split_with_sizes squeeze t transpose unbind unfold unsqueeze view view_as view_as_complex
    view_as_real
    """.split()  # noqa: SIM905
)
# Operators that take tensors of the host: the lengths of a kernel whose work is cut on the host, and indices.
TAKES_HOST_TENSORS = frozenset({"atb::_npu_paged_attention", "atb::_npu_paged_attention_get_workspace"})
COPIES_HOST_TENSORS = frozenset({"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"})


# They make the tensor that they index dense first: all of a view is copied, memory that is not mapped included.
MAKES_DENSE = frozenset({"aten::index_select", "aten::index_copy", "aten::index_copy_"})


class Arguments:
    """The arguments of one call, with CPU aliases instead of device tensors."""

    def __init__(self, name: str, args: Sequence[Any], kwargs: dict[str, Any]):
        self.name = name
        self.device: torch.device | None = None
        self.tensors: list[Tensor] = []
        self.on_host: list[Tensor] = []
        self.args = [self._alias(each) for each in args]
        self.kwargs = {key: self._alias(each) for key, each in kwargs.items()}

    def _alias(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, list | tuple):
            return [self._alias(each) for each in value]
        if isinstance(value, torch.device):
            self.device = value if self.device is None else self.device
            return torch.device("cpu")
        if isinstance(value, torch.Generator):
            return _generator(value)
        return value

    def _tensor(self, tensor: Tensor) -> Tensor:
        kind = tensor.device.type
        if kind == "npu":
            self.device = tensor.device
            self.tensors.append(tensor)
            return host(tensor)
        if kind == "cpu":
            if tensor.dim() == 0:
                return tensor.clone()  # a scalar argument, part of the command
            self.on_host.append(tensor)
            return tensor.clone() if self.name in TAKES_HOST_TENSORS else tensor  # taken when the kernel is launched
        return tensor

    def check_devices(self) -> None:
        if self.on_host and self.tensors and self.name not in TAKES_HOST_TENSORS | COPIES_HOST_TENSORS:
            shapes = [tuple(each.shape) for each in self.on_host]
            raise RuntimeError(
                f"{self.name}: Expected all tensors to be on the same device, but {shapes} are on the cpu"
            )

    def check_dense(self) -> None:
        if self.name in MAKES_DENSE and not self.args[0].is_contiguous():
            raise RuntimeError(f"{self.name}: a view with strides {self.args[0].stride()} would be copied whole")

    def ranges(self) -> list[Range]:
        return [range_of(tensor) for tensor in self.tensors]

    def on_meta(self) -> tuple[list[Any], dict[str, Any]]:
        return [_meta(each) for each in self.args], {key: _meta(each) for key, each in self.kwargs.items()}


def _meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value if value.dim() == 0 and value.device.type == "cpu" and value.numel() == 0 else as_meta(value)
    if isinstance(value, list):
        return [_meta(each) for each in value]
    return torch.device("meta") if isinstance(value, torch.device) else value


_generators: dict[int, tuple[torch.Generator, int, torch.Generator]] = {}


def _generator(generator: torch.Generator) -> torch.Generator:
    """A CPU generator that stands for a device's, begun anew when the device's is seeded anew."""
    if generator.device.type != "npu":
        return generator
    known = _generators.get(id(generator))
    if known is None or known[1] != generator.initial_seed():
        made = torch.Generator().manual_seed(generator.initial_seed())
        known = _generators[id(generator)] = (generator, generator.initial_seed(), made)
    return known[2]


def current_stream(device: torch.device | None) -> int:
    index = device.index if device is not None and device.index is not None else torch_npu._C._npu_getDevice()
    return int(torch_npu._C._npu_getCurrentRawStream(index))


class Launcher:
    """Makes the PrivateUse1 kernel of an operator out of its CPU kernel."""

    def __init__(self, machine: Machine):
        self.machine = machine

    def kernel(
        self, op: Any, shapes: Callable[..., Any] | None = None, *, host_only: bool = False
    ) -> Callable[..., Any]:
        """`shapes`: the outputs on the meta device, where `op` itself has no meta kernel. `host_only`: never queued."""
        schema, name = op._schema, op._schema.name
        written = [
            (i, arg.name)
            for i, arg in enumerate(schema.arguments)
            if arg.alias_info is not None and arg.alias_info.is_write
        ]
        into_list = any(
            arg.name == "out" and arg.kwarg_only and not arg.alias_info for arg in schema.arguments
        )  # FIA's .out
        returns_written = bool(written) and all(each.alias_info is not None for each in schema.returns)
        is_void = not schema.returns

        def originals(args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
            if is_void:
                return None
            if returns_written:
                found = [kwargs[arg] if arg in kwargs else args[i] for i, arg in written]
                return found[0] if len(found) == 1 else tuple(found)
            return tuple(kwargs["out"])

        makes_outputs = not (is_void or returns_written or into_list)

        def run(*args: Any, **kwargs: Any) -> Any:
            call = Arguments(name, args, kwargs)
            call.check_dense()
            stream = current_stream(call.device)
            if call.on_host:
                call.check_devices()
                if self.machine.is_recording(stream) and name in COPIES_HOST_TENSORS:
                    self.forbidden()
            if host_only or self.machine.is_plain(stream):
                result = op(*call.args, **call.kwargs) if makes_outputs else _bound(op, call)()
                return self._on_device(result, call.device) if makes_outputs else originals(args, kwargs)
            if not makes_outputs:
                self.machine.submit(stream, Kernel(str(op), _bound(op, call), call.ranges()))
                return originals(args, kwargs)
            return self._recorded(op, shapes or op, call, stream)

        return run

    def _on_device(self, result: Any, device: torch.device | None) -> Any:
        if isinstance(result, Tensor):
            made = device_like(result, device or torch.device("npu"))
            if result.numel():
                host(made).copy_(result)
            return made
        if isinstance(result, list | tuple):
            return type(result)(self._on_device(each, device) for each in result)
        return result

    def _recorded(self, op: Any, shapes: Callable[..., Any], call: Arguments, stream: int) -> Any:
        """Allocate the outputs and queue the kernel, without running it."""
        args, kwargs = call.on_meta()
        try:
            planned = shapes(*args, **kwargs)
        except (NotImplementedError, RuntimeError):
            return self._waiting(op, call, stream)  # how large the result is, is in the data
        if stream in self.machine.updates:
            raise RuntimeError(f"{op}: a task update with an operator that allocates its result")
        outputs: list[Tensor] = []
        result = self._allocate(planned, call.device, outputs)
        aliases = [host(each) for each in outputs]
        if stream in self.machine.captures:
            for alias in aliases:
                poison(alias)
        ranges = [*call.ranges(), *(range_of(each) for each in outputs)]
        run = _bound(op, call)

        def replay() -> None:
            for alias, value in zip(aliases, _flat(run()), strict=True):
                if alias.numel():
                    alias.copy_(value)

        self.machine.submit(stream, Kernel(str(op), replay, ranges))
        return result

    def _allocate(self, planned: Any, device: torch.device | None, outputs: list[Tensor]) -> Any:
        if isinstance(planned, Tensor):
            outputs.append(device_like(planned, device or torch.device("npu")))
            return outputs[-1]
        if isinstance(planned, list | tuple):
            return type(planned)(self._allocate(each, device, outputs) for each in planned)
        return planned

    def _waiting(self, op: Any, call: Arguments, stream: int) -> Any:
        self.forbidden()
        self.wait(stream)
        return self._on_device(op(*call.args, **call.kwargs), call.device)

    def forbidden(self) -> None:
        """Raise if a capture forbids what waits for the device."""
        code = runtime.library().emulated_npu_unsafe_in_capture()
        if code:
            raise runtime.AclError(code)

    def wait(self, stream: int) -> None:
        code = self.machine.sync_stream(stream)
        if code:
            raise runtime.AclError(code)


def _bound(op: Any, call: Arguments) -> Callable[[], Any]:
    """The call on aliases; the device tensors themselves must not be kept."""
    args, kwargs = call.args, call.kwargs
    outs = [kwargs[arg.name] for arg in op._schema.arguments if arg.kwarg_only and arg.is_write and arg.name in kwargs]
    if not outs:
        return lambda: op(*args, **kwargs)
    shapes = [each.shape for each in _flat(outs)]

    def into_outs() -> Any:
        result = op(*args, **kwargs)
        for each, shape in zip(_flat(outs), shapes, strict=True):
            if each.shape != shape:
                raise NotImplementedError(f"{op}: out= of shape {tuple(shape)} for a result of {tuple(each.shape)}")
        return result

    return into_outs


def _flat(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [tensor for each in result for tensor in _flat(each)] if isinstance(result, list | tuple) else []


def replace_aten(launcher: Launcher) -> torch.library.Library:
    """The library must be kept: the kernels go with it."""
    library = torch.library.Library("aten", "IMPL")
    for qualified in torch._C._dispatch_get_registrations_for_dispatch_key("PrivateUse1"):
        namespace, name = qualified.split("::")
        base, _, overload = name.partition(".")
        if namespace == "aten" and base not in NATIVE and base != "copy_":
            op = getattr(getattr(torch.ops.aten, base, None), overload or "default", None)
            if op is None:
                continue  # a kernel for which torch has no schema
            library.impl(name, launcher.kernel(op), "PrivateUse1", allow_override=True)
    return library
