"""`LimitedEnvironment`: Jinja's sandbox with bounds on the time and the memory that a template may take.

Loops, calls and filters look at the clock. What can blow up in one step, where no clock is looked at, is weighed
before or after: repetition, powers, padding, joining, and printing lists that hold themselves many times over.
The bounds are per rendering; a thread renders one template at a time.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from jinja2 import nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from xllm.request import MAX_RENDERED_CHARS

MAX_SECONDS = 10.0
MAX_TEXT_CHARS = MAX_RENDERED_CHARS
MAX_NUMBER = 10**6  # as an argument: a width, an indent, a count
MAX_VALUES = 2**19  # in what is printed at once
MAX_INTEGER_BITS = 4096
_TICKS_PER_LOOK = 64
_EACH, _SHOWN, _SIZED = "xllm_each", "xllm_shown", "xllm_sized"
# They neither print their operand nor go below its first level.
_SHALLOW = frozenset({"length", "count", "first", "last", "list", "items", "map", "select", "reject", "selectattr",
                      "rejectattr", "default", "d", "batch", "slice", "attr", "reverse", "dictsort", "sort", "unique",
                      "groupby", "min", "max", "sum", _EACH, _SIZED})
_LONG_FIELD = re.compile(r"\d{5}")
MAX_INDENT = 64


class TemplateLimitError(Exception):
    """A template takes too long or makes too much."""


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """Bounds hold for what runs within `limited`, sizes everywhere."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, **options: Any):
        super().__init__(finalize=self._finalised, **options)
        self._running = threading.local()
        self.filters.update({_EACH: self._each, _SHOWN: self._finalised, _SIZED: _sized})

    @contextmanager
    def limited(self, seconds: float, since_s: float) -> Iterator[None]:
        """Raises TemplateLimitError within, `seconds` after `since_s`, which is on the `time.monotonic()` clock."""
        self._running.clock = _Clock(seconds, since_s)
        try:
            yield
        finally:
            self._running.clock = None

    def tick(self) -> None:
        """Raise TemplateLimitError if the time is over."""
        clock = getattr(self._running, "clock", None)
        if clock is not None:
            clock.tick()

    def guard_filters(self) -> None:
        """Put the bounds around all filters; call it when they are complete."""
        self.globals.pop("lipsum", None)
        for name, function in self.filters.items():
            if name not in (_EACH, _SHOWN, _SIZED):
                self.filters[name] = self._guarded(name, function)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in list(tree.find_all(nodes.For)):
            loop.iter = _filtered(loop.iter, _EACH)
        for joined in list(tree.find_all(nodes.Concat)):
            joined.nodes = [node if isinstance(node, nodes.Const) else _filtered(node, _SHOWN) for node in joined.nodes]
        for assigned in list(tree.find_all(nodes.Assign)):
            assigned.node = _filtered(assigned.node, _SIZED)
        for block in list(tree.find_all(nodes.AssignBlock)):
            block.filter = nodes.Filter(block.filter, _SIZED, [], [], None, None, lineno=block.lineno)
        return tree

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        __self.tick()
        _check_arguments((*args, *kwargs.values()))
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            _check_method(owner, getattr(__obj, "__name__", ""), args)
        return _sized(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def checked(*args: Any, **kwargs: Any) -> str:
            _check_method(value.__self__, "format", (*args, *kwargs.values()))
            return wrapped(*args, **kwargs)

        return checked

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _check_operands(operator, left, right)
        return _sized(super().call_binop(context, operator, left, right))

    def _each(self, values: Any) -> Iterator[Any]:
        iterator = iter(values)  # here, so that what cannot be iterated is said as ever

        def each() -> Iterator[Any]:
            for value in iterator:
                self.tick()
                yield value

        return each()

    def _finalised(self, value: Any) -> Any:
        weigh(value)
        return value

    def _guarded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        num_own = 1 if getattr(function, "jinja_pass_arg", None) is not None else 0  # context or environment first

        def guarded(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            given = (*args[num_own:], *kwargs.values())
            _check_arguments(given[1:])
            if name == "tojson" and any(isinstance(v, int) and v > MAX_INDENT for v in given[1:]):
                raise TemplateLimitError(f"it indents by more than {MAX_INDENT}")
            if name not in _SHALLOW:
                for value in given:
                    weigh(value)
            if given and isinstance(given[0], str):
                _check_method(given[0], name, given[1:])
            elif name == "join" and given and isinstance(given[0], (list, tuple)):
                _check_product(len(given[0]), max((len(v) for v in given[1:2] if isinstance(v, str)), default=0))
            return _sized(function(*args, **kwargs))

        guarded.__dict__.update(getattr(function, "__dict__", {}))
        return guarded


class _Clock:
    def __init__(self, seconds: float, since_s: float):
        self._seconds = seconds
        self._end_s = since_s + seconds
        self._num_ticks = 0

    def tick(self) -> None:
        self._num_ticks += 1
        if self._num_ticks % _TICKS_PER_LOOK == 0 and time.monotonic() > self._end_s:
            raise TemplateLimitError(f"it takes more than {self._seconds:g} seconds")


def weigh(value: Any) -> None:
    """Raise TemplateLimitError if `value` prints as more than MAX_VALUES values or MAX_TEXT_CHARS characters."""
    if not isinstance(value, (list, tuple, dict)):
        return
    num_values = num_chars = 0
    pending: list[Iterator[Any]] = [iter((value,))]
    while pending:
        for item in pending[-1]:
            num_values += 1
            if isinstance(item, str):
                num_chars += len(item)
            elif isinstance(item, Mapping):
                num_chars += sum(len(key) for key in item if isinstance(key, str))
                pending.append(iter(item.values()))
                break
            elif isinstance(item, (list, tuple)):
                pending.append(iter(item))
                break
        else:
            pending.pop()
        if num_values > MAX_VALUES or num_chars > MAX_TEXT_CHARS:
            raise TemplateLimitError("it prints too much")


def _filtered(node: nodes.Node, name: str) -> nodes.Filter:
    assert isinstance(node, nodes.Expr)
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _sized(value: Any) -> Any:
    if isinstance(value, str) and len(value) > MAX_TEXT_CHARS:
        raise TemplateLimitError(f"it makes a text of more than {MAX_TEXT_CHARS} characters")
    if isinstance(value, (list, tuple, dict)) and len(value) > MAX_VALUES:
        raise TemplateLimitError(f"it makes a list of more than {MAX_VALUES} values")
    return value


def _check_arguments(arguments: tuple[Any, ...]) -> None:
    for value in arguments:
        if isinstance(value, int) and abs(value) > MAX_NUMBER:
            raise TemplateLimitError(f"it uses a number beyond {MAX_NUMBER}")


def _check_operands(operator: str, left: Any, right: Any) -> None:
    if operator == "%" and isinstance(left, str):
        if _LONG_FIELD.search(left):
            raise TemplateLimitError("it formats with a field of great width")
        weigh(right)
        _check_arguments(right if isinstance(right, tuple) else (right,))
    if operator in ("*", "**"):
        for value, other in ((left, right), (right, left)):
            if isinstance(value, (str, list, tuple)) and isinstance(other, int):
                _check_product(len(value), other)
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * (max(right, 0) if operator == "**" else 1) + right.bit_length()
            if bits > MAX_INTEGER_BITS:
                raise TemplateLimitError("it computes too large a number")


def _check_method(text: str, method: str, arguments: tuple[Any, ...]) -> None:
    """Methods and filters of text that can make a long one of short ones."""
    if method == "replace" and len(arguments) > 1 and isinstance(arguments[1], str):
        _check_product(len(text) + 1, len(arguments[1]))
    elif method == "join" and arguments and isinstance(arguments[0], (list, tuple)):
        weigh(arguments[0])
        _check_product(len(arguments[0]), len(text))
    elif method == "indent" or method == "expandtabs":
        if any(isinstance(value, int) and value > MAX_INDENT for value in arguments):
            raise TemplateLimitError(f"it indents by more than {MAX_INDENT}")
    elif method in ("format", "format_map"):
        if _LONG_FIELD.search(text):
            raise TemplateLimitError("it formats with a field of great width")
        for value in arguments:
            weigh(value)
    elif method == "translate":
        raise TemplateLimitError("it translates text")


def _check_product(first: int, second: int) -> None:
    if first * second > MAX_TEXT_CHARS:
        raise TemplateLimitError(f"it makes a text of more than {MAX_TEXT_CHARS} characters")

