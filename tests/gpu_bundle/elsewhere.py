"""`python -m tests.gpu_bundle.elsewhere`: the cases of `ops` and `micro` over a memory that is not the CPU's.

A tensor there holds one of the CPU, by which it is computed, but says that it lies on another device; whatever mixes
the two, as no GPU would, is an error. The operators are the reference's, which run on any device. Prints what
broke, as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from backends.cpu.cpu import CpuBackend
from backends.reference import REFERENCE
from benchmarks.gpu.device import Device
from benchmarks.gpu.micro_cases import all_cases
from benchmarks.gpu.op_cases import Check, World
from benchmarks.gpu.ops import OPERATORS, examine
from benchmarks.gpu.profile import TINY
from benchmarks.gpu.shapes import SHAPES
from benchmarks.gpu.spot import SPOTS, on_host

_setup_privateuseone_for_python_backend("elsewhere")
ELSEWHERE = torch.device("elsewhere", 0)
CROSSING = ("copy_", "_to_copy")  # what may have tensors of both memories
# Whose indices may lie in the CPU's memory, though what they index does not.
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class There(Tensor):
    """inner: the tensor of the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> There:
        there = Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(), dtype=inner.dtype,
                                              storage_offset=inner.storage_offset(), device=ELSEWHERE)
        there.inner = inner
        return there

    def tolist(self) -> Any:
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


class TwoMemories(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


class MadeThere(TorchFunctionMode):
    """What `torch.tensor` makes reaches no dispatcher."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.tensor or torch.device(kwargs.get("device") or "cpu").type != ELSEWHERE.type:
            return func(*args, **kwargs)
        return There(func(*args, **kwargs | {"device": "cpu"}))


def dispatch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    there, name, asked = [isinstance(x, There) for x in tensors], func.overloadpacket.__name__, kwargs.get("device")
    if any(there) and not all(there) and name not in CROSSING:
        check_strangers(func, name, args, tensors)
    goes_there = any(there) if asked is None else torch.device(asked).type == ELSEWHERE.type
    if name == "copy_":
        goes_there = there[0]
    inner_args, inner_kwargs = tree_map(inner, args), tree_map(inner, kwargs)
    if asked is not None:
        inner_kwargs["device"] = torch.device("cpu")
    out = func(*inner_args, **inner_kwargs)
    for given, used in zip(args, inner_args):
        if out is used:  # in place
            return given
    return tree_map(wrap, out) if goes_there else out


def check_strangers(func: Any, name: str, args: tuple[Any, ...], tensors: list[Tensor]) -> None:
    strangers = [x for x in tensors if not isinstance(x, There) and x.dim() > 0]
    if name in INDEXING and isinstance(args[0], There):
        indices = tree_leaves(args[1])
        strangers = [x for x in strangers if not any(x is index for index in indices)]
    if strangers or (not isinstance(args[0], There) and name.endswith("_")):
        raise RuntimeError(f"{func} has tensors of two devices: {[type(x).__name__ for x in tensors]}")


def inner(x: Any) -> Any:
    return x.inner if isinstance(x, There) else x


def wrap(x: Any) -> Any:
    return There(x) if isinstance(x, Tensor) and not isinstance(x, There) else x


class FarBackend(CpuBackend):
    def __init__(self) -> None:
        super().__init__(compiled=False)
        self.device, self.ops = ELSEWHERE, REFERENCE


class FarDevice(Device):
    def __init__(self) -> None:
        super().__init__("far", FarBackend())

    def generator(self, seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)


def ops_broken(device: Device) -> Iterator[str]:
    for name, cases in OPERATORS.items():
        yield from faults_of(name, cases(World(device, seed=3, cases=2, longest=40, dtypes=DTYPES)))
    for name, spots in SPOTS.items():
        world = World(device, seed=3, cases=1, longest=40, dtypes=DTYPES)
        yield from faults_of(f"spot/{name}", map(on_host, spots(world, SHAPES["tiny"])))


def faults_of(name: str, checks: Iterable[Check]) -> Iterator[str]:
    try:
        for check in checks:
            why = "" if check.absent else examine(check)[1]
            if why:
                yield f"{name}/{check.name}: {why}"
    except Exception as error:
        yield f"{name}: {described(error)}"


def micro_broken(device: Device) -> Iterator[str]:
    for case in all_cases(device, TINY):
        try:
            for call in case.calls(2):
                call()
        except Exception as error:
            yield f"{case.id}: {described(error)}"


def mixed_broken(device: Device) -> Iterator[str]:
    """That what should be found is found."""
    far, near = torch.ones(4, device=device.torch), torch.ones(4)
    for name, call in (("add", lambda: far + near), ("fill", lambda: near.add_(far)), ("choose", lambda: near[far > 0]),
                       ("put", lambda: near.index_put_((torch.arange(4),), far)), ("fine", lambda: near + far.cpu()),
                       ("also fine", lambda: far[torch.arange(2)] + 1)):  # fmt: skip
        try:
            call()
        except RuntimeError as error:
            yield f"{name}: {described(error)}"


def described(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:200]}"


SECTIONS = {"ops": ops_broken, "micro": micro_broken, "mixed": mixed_broken}


def main() -> None:
    torch.set_num_threads(1)
    # Inference mode would leave composite operators whole, `to` among them.
    with torch.no_grad(), TwoMemories(), MadeThere():
        print(json.dumps({name: list(section(FarDevice())) for name, section in SECTIONS.items()}))


if __name__ == "__main__":
    main()
