"""Which operators of torch_npu are emulated: for each a reference in plain torch, with the schema's own arguments.

A reference runs on CPU tensors (the device's memory) and is also registered as the operator's CPU kernel, so that
`torch.library.opcheck` can hold it against the wheel's meta kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Reference:
    function: Callable[..., Any]
    shapes: Callable[..., Any] | None = None  # the result on the meta device, where the wheel has no meta kernel
    host_only: bool = False  # runs nothing on the device
    inspect: Callable[..., None] | None = None  # given the device's own tensors, for what only their description says


REFERENCES: dict[str, Reference] = {}


def emulates(
    *names: str,
    shapes: Callable[..., Any] | None = None,
    host_only: bool = False,
    inspect: Callable[..., None] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as the reference of operators such as `npu::npu_swiglu`."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for name in names:
            assert name not in REFERENCES, name
            REFERENCES[name] = Reference(function, shapes, host_only, inspect)
        return function

    return register


def overload(name: str) -> Any:
    """`npu::x` or `npu::x.out` to the operator."""
    namespace, rest = name.split("::")
    base, _, which = rest.partition(".")
    return getattr(getattr(getattr(torch.ops, namespace), base), which or "default")


def refuse(name: str, given: dict[str, Any], allowed: tuple[Any, ...] = (None,)) -> None:
    """Arguments of an operator that the emulator does not know must keep their neutral value."""
    for key, value in given.items():
        if not any(value is each or (not isinstance(value, torch.Tensor) and value == each) for each in allowed):
            raise NotImplementedError(f"{name}: {key}={value!r} is not emulated")


# A format cast changes a tensor's description, which only the device has: it has no reference (formats.py).
BY_DESCRIPTION = ("npu::npu_format_cast",)


def names() -> list[str]:
    """All emulated operators."""
    return sorted([*REFERENCES, *BY_DESCRIPTION])
