"""`Contract`: what an Ascend operator's documentation asks of its arguments, as rules that can be checked.

The host code of torch_npu lets nearly everything through; what is wrong surfaces as an error code of the device at a
later synchronisation, or as wrong numbers. So every wrapper of this package names its operator's contract and has its
arguments checked before the call while checking is on (`set_checking`): in tests, and with XLLM_NPU_CHECK=1.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

HALVES = (torch.float16, torch.bfloat16)
FLOATS = (*HALVES, torch.float32)
INDICES = (torch.int32, torch.int64)


class ContractError(ValueError):
    """Arguments that an operator's documentation does not allow; names the operator, the rule and where it stands."""


@dataclass(frozen=True, slots=True)
class Rule:
    """holds: of the call's arguments, by attribute. source: where the rule is documented.

    reads_values: it looks at numbers on the device, which no captured step may.
    """

    text: str
    source: str
    holds: Callable[[Any], bool]
    reads_values: bool = False


@dataclass(frozen=True, slots=True)
class Contract:
    """The rules of one operator, checked in order: later ones may rely on the earlier. form: which of its uses they are
    of, where it has several."""

    op: str
    rules: tuple[Rule, ...]
    form: str = ""

    def check(self, arguments: dict[str, Any], *, read_values: bool) -> None:
        """Raise ContractError at the first rule that does not hold."""
        given = SimpleNamespace(**arguments)
        for rule in self.rules:
            if (read_values or not rule.reads_values) and not rule.holds(given):
                raise ContractError(f"{self.op}{self.form}: {rule.text} ({rule.source}); got "
                                    f"{', '.join(_described(arguments))}")


class Checking:
    """Whether contracts are checked, for the process; values only by threads that capture nothing."""

    def __init__(self) -> None:
        self.on = False
        self._local = threading.local()

    def reads_values(self) -> bool:
        return not getattr(self._local, "capturing", False)

    def set_capturing(self, capturing: bool) -> None:
        """What this thread queues from now on is recorded, or no longer is."""
        self._local.capturing = capturing


CHECKING = Checking()


def set_checking(on: bool) -> None:
    """Check every call's arguments from now on, or none."""
    CHECKING.on = on


def _described(arguments: dict[str, Any]) -> Iterator[str]:
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            layout = "" if value.is_contiguous() else f" strides {list(value.stride())}"
            yield f"{name} {str(value.dtype).removeprefix('torch.')}{list(value.shape)}{layout}"
        elif value is not None:
            yield f"{name}={value!r}" if len(repr(value)) < 60 else f"{name} of {len(value)}"


# --- rules that many operators share


def dtypes(source: str, allowed: tuple[torch.dtype, ...], *names: str) -> Rule:
    listed = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
    return Rule(f"{' and '.join(names)} must be of dtype {listed}", source,
                lambda a: all(t.dtype in allowed for t in _given(a, names)))


def same_dtype(source: str, *names: str) -> Rule:
    return Rule(f"{', '.join(names)} must have one dtype", source,
                lambda a: len({t.dtype for t in _given(a, names)}) <= 1)


def contiguous(source: str, *names: str) -> Rule:
    return Rule(f"{', '.join(names)} must be contiguous", source,
                lambda a: all(t.is_contiguous() for t in _given(a, names)))


def ranks(source: str, lowest: int, highest: int, *names: str) -> Rule:
    size = str(lowest) if lowest == highest else f"{lowest} to {highest}"
    return Rule(f"{' and '.join(names)} must have {size} axes", source,
                lambda a: all(lowest <= t.ndim <= highest for t in _given(a, names)))


def same_shape(source: str, *names: str) -> Rule:
    return Rule(f"{', '.join(names)} must have one shape", source,
                lambda a: len({t.shape for t in _given(a, names)}) <= 1)


def one_of(source: str, name: str, allowed: tuple[Any, ...]) -> Rule:
    return Rule(f"{name} must be {' or '.join(map(repr, allowed))}", source, lambda a: getattr(a, name) in allowed)


def on_one_device(*names: str) -> Rule:
    return Rule(f"{', '.join(names)} must be on one NPU", "torch_npu",
                lambda a: {t.device.type for t in _given(a, names)} <= {"npu", "meta"}
                and len({t.device for t in _given(a, names)}) == 1)


def _given(arguments: Any, names: tuple[str, ...]) -> list[Tensor]:
    values = (getattr(arguments, name) for name in names)
    return [value for value in values if value is not None]
