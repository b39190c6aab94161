"""Device tensors seen as CPU tensors of the same memory, and the values that uninitialised memory holds."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

POISON_INT = -0x5A5A5A5B  # truncated to the type: an index that is far out of any range
Range = tuple[int, int]  # address, bytes

_aliases: dict[tuple[Any, ...], Tensor] = {}
MOST_ALIASES = 16384


def is_npu(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == "npu"


def host(tensor: Tensor) -> Tensor:
    """The device's memory as a CPU tensor. It keeps nothing alive: it is an address, as in a command to a device.

    Callers must not change its shape or strides: there is one for each address, shape and type.
    """
    address = tensor.data_ptr()
    key = (address, tensor.dtype, tensor.size(), tensor.stride())
    found = _aliases.get(key)
    if found is None and tensor.numel() == 0:
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
    if found is None:
        if len(_aliases) >= MOST_ALIASES:
            _aliases.clear()
        found = _aliases[key] = _alias(tensor, address)
    return found


def _alias(tensor: Tensor, address: int) -> Tensor:
    with torch.inference_mode(False):  # kept for later callers, who may be outside of it
        memory = torch.frombuffer((ctypes.c_char * range_of(tensor)[1]).from_address(address), dtype=torch.uint8)
        alias = torch.empty(0, dtype=tensor.dtype)
        return alias.set_(memory.untyped_storage(), 0, tensor.size(), tensor.stride())


def range_of(tensor: Tensor) -> Range:
    """What part of memory a tensor spans, from its first element to its last."""
    if tensor.numel() == 0:
        return (0, 0)
    last = sum((size - 1) * stride for size, stride in zip(tensor.size(), tensor.stride(), strict=True))
    return (tensor.data_ptr(), (last + 1) * tensor.element_size())


def as_meta(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")


def device_like(tensor: Tensor, device: torch.device) -> Tensor:
    """An uninitialised device tensor with the shape, strides and type of any other."""
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)


def poison(alias: Tensor) -> None:
    """Make a read of this memory visible: NaN, or integers that are out of range."""
    if alias.numel() == 0:
        return
    if alias.is_floating_point() or alias.is_complex():
        alias.fill_(float("nan"))
    elif alias.dtype is torch.bool:
        alias.fill_(True)
    else:
        bits = alias.element_size() * 8
        value = POISON_INT & ((1 << bits) - 1)
        signed = alias.dtype.is_signed and value >> (bits - 1)
        alias.fill_(value - (1 << bits) if signed else value)
