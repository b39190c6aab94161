"""`LimitedEnvironment`: Jinja's sandbox with bounds on the time and the memory that a template may take.

Loops, calls and filters look at the clock. What runs inside C, where no clock is looked at, is bounded by what it works
on: every list, tuple and dict is weighed when it is made (`template_weights.py`), methods and filters of text are held
against their arguments (`template_texts.py`), and what is left over is listed here. The bounds are per rendering; a
thread renders one template at a time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

from jinja2 import nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from xllm.request import MAX_RENDERED_CHARS
from xllm.text.template_texts import MAX_INDENT, check_format, check_product, check_text_call
from xllm.text.template_weights import MAX_VALUES, TemplateLimitError, TemplateWeights

MAX_SECONDS = 10.0  # of one rendering. Chosen: real templates take milliseconds
MAX_TEXT_CHARS = MAX_RENDERED_CHARS
MAX_NUMBER = 10**6  # as an argument: a width, an indent, a count. Chosen: beyond what templates use
MAX_INTEGER_BITS = 4096  # of a result. Chosen: multiplying and printing such a number takes microseconds
# Of a template: the compiler, too, runs inside C. Chosen: several times the largest templates in use.
MAX_NODES = 2**15
MAX_PRETTY_VALUES = 2**14  # that `pprint` lays out. Chosen: far beyond templates' use; laying out takes long, inside C
# Between two looks at the clock. Chosen: a look costs more than a tick, and so many ticks take microseconds.
_TICKS_PER_LOOK = 64
_EACH, _SHOWN, _SIZED, _CONCAT = "xllm_each", "xllm_shown", "xllm_sized", "xllm_concat"


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with bounds. The bound on time holds within `limited`, those on sizes everywhere."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, **options: Any):
        super().__init__(finalize=self._sized, **options)
        self._running = threading.local()
        self.filters.update({_EACH: self._each, _SHOWN: self._sized, _SIZED: self._sized, _CONCAT: self._concatenated})

    @contextmanager
    def limited(self, seconds: float, since_s: float) -> Iterator[None]:
        """Raises TemplateLimitError within, `seconds` after `since_s`, which is on the `time.monotonic()` clock."""
        self._running.clock, self._running.weights = _Clock(seconds, since_s), TemplateWeights(MAX_TEXT_CHARS)
        try:
            yield
        finally:
            self._running.clock = self._running.weights = None

    @property
    def _weights(self) -> TemplateWeights:
        return getattr(self._running, "weights", None) or TemplateWeights(MAX_TEXT_CHARS)

    def tick(self) -> None:
        """Raise TemplateLimitError if the time is over."""
        clock = getattr(self._running, "clock", None)
        if clock is not None:
            clock.tick()

    def guard_filters(self) -> None:
        """Put the bounds around all filters; call it when they are complete."""
        self.globals.pop("lipsum", None)
        for name, function in self.filters.items():
            if name not in (_EACH, _SHOWN, _SIZED, _CONCAT):
                self.filters[name] = self._guarded(name, function)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        if sum(1 for _ in tree.find_all(nodes.Node)) > MAX_NODES:
            raise TemplateLimitError(f"it has more than {MAX_NODES} expressions")
        for loop in list(tree.find_all(nodes.For)):
            loop.iter = _filtered(loop.iter, _EACH)
        for assigned in list(tree.find_all(nodes.Assign)):
            assigned.node = _filtered(assigned.node, _SIZED)
        for block in list(tree.find_all(nodes.AssignBlock)):
            block.filter = nodes.Filter(block.filter, _SIZED, [], [], None, None, lineno=block.lineno)
        return _Weighing().visit(tree)  # type: ignore[no-any-return]

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        __self.tick()
        given = (*args, *kwargs.values())
        _check_arguments(given)
        __self._weights.check(given)  # a macro gets them as a list
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, str):
            if name == "join":
                args = tuple(map(__self._listed, args))
                given = (*args, *kwargs.values())
            check_text_call(owner, name, given, __self._weights, MAX_TEXT_CHARS)
        return __self._sized(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def checked(*args: Any, **kwargs: Any) -> str:
            check_format(value.__self__, (*args, *kwargs.values()), self._weights, MAX_TEXT_CHARS)
            return wrapped(*args, **kwargs)

        return checked

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self._check_operands(operator, left, right)
        result = super().call_binop(context, operator, left, right)
        if operator == "+" and isinstance(result, (list, tuple)):
            self._weights.check_sum(left, right, result)
            return result
        return self._sized(result)

    def _check_operands(self, operator: str, left: Any, right: Any) -> None:
        if operator == "%" and isinstance(left, str):
            check_format(left, (right,), self._weights, MAX_TEXT_CHARS)
            _check_arguments(right if isinstance(right, tuple) else (right,))
        if operator in ("*", "**"):
            for value, other in ((left, right), (right, left)):
                if isinstance(value, (str, list, tuple)) and isinstance(other, int):
                    check_product(len(value), other, MAX_TEXT_CHARS)
            if isinstance(left, int) and isinstance(right, int):
                bits = left.bit_length() * (max(right, 0) if operator == "**" else 1) + right.bit_length()
                if bits > MAX_INTEGER_BITS:
                    raise TemplateLimitError("it computes too large a number")

    def _each(self, values: Any) -> Iterator[Any]:
        iterator = iter(values)  # here, so that what cannot be iterated is said as ever

        def each() -> Iterator[Any]:
            for value in iterator:
                self.tick()
                yield value

        return each()

    def _listed(self, value: Any) -> Any:
        """What an iterator gives, as a list that can be weighed."""
        return self._sized(list(islice(self._each(value), MAX_VALUES + 1))) if isinstance(value, Iterator) else value

    def _sized(self, value: Any) -> Any:
        self._weights.check(value)
        return value

    def _concatenated(self, values: Sequence[Any]) -> str:
        """`a ~ b ~ c`, whose parts are known to be small enough to be shown."""
        texts, num_chars = [], 0
        for value in values:
            texts.append(str(value))
            num_chars += len(texts[-1])
            if num_chars > MAX_TEXT_CHARS:
                raise TemplateLimitError(f"it makes a text of more than {MAX_TEXT_CHARS} characters")
        return "".join(texts)

    def _guarded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        num_own = 1 if getattr(function, "jinja_pass_arg", None) is not None else 0  # context or environment first

        def guarded(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            if name == "join":
                args = (*args[:num_own], *map(self._listed, args[num_own:]))
            given = (*args[num_own:], *kwargs.values())
            _check_arguments(given[1:])
            self._check_filter(name, given)
            if given and isinstance(given[0], str):
                check_text_call(given[0], name, given[1:], self._weights, MAX_TEXT_CHARS)
            return self._sized(function(*args, **kwargs))

        guarded.__dict__.update(getattr(function, "__dict__", {}))
        return guarded

    def _check_filter(self, name: str, given: tuple[Any, ...]) -> None:
        """Filters that make more of a value than it is."""
        weights = self._weights
        numbers = [value for value in given[1:] if isinstance(value, int)]
        for value in given:
            weights.check(value)
        if name == "tojson" and numbers and max(numbers) > 0:
            if max(numbers) > MAX_INDENT:
                raise TemplateLimitError(f"it indents by more than {MAX_INDENT}")
            check_product(weights.num_values(given[0]), 16 * max(numbers), MAX_TEXT_CHARS)
        elif name == "join" and given and isinstance(given[0], (list, tuple)):
            separators = [len(value) for value in given[1:2] if isinstance(value, str)]
            check_product(len(given[0]), max(separators, default=0), MAX_TEXT_CHARS)
        elif name == "join" and given and isinstance(given[0], str) and len(given[0]) > MAX_VALUES:
            raise TemplateLimitError(f"it joins more than {MAX_VALUES} characters")
        elif name == "sum" and not all(value is None or isinstance(value, (int, float, str)) for value in given[1:]):
            raise TemplateLimitError("it adds lists up")  # each addition copies all that came before
        elif name == "round" and numbers and max(numbers) > MAX_INDENT:
            raise TemplateLimitError(f"it rounds to more than {MAX_INDENT} digits")
        elif name == "pprint" and given and weights.num_values(given[0]) > MAX_PRETTY_VALUES:
            raise TemplateLimitError(f"it lays out more than {MAX_PRETTY_VALUES} values")


class _Weighing(NodeTransformer):
    """Has every list, tuple and dict that is not a constant weighed, and concatenations bounded."""

    def visit_List(self, node: nodes.List) -> nodes.Node:
        return self._weighed(node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        return self._weighed(node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        return self._weighed(node) if node.ctx == "load" else node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        shown = [part if isinstance(part, nodes.Const) else _filtered(part, _SHOWN) for part in node.nodes]
        return _filtered(nodes.List(shown, lineno=node.lineno), _CONCAT)

    def _weighed(self, node: nodes.Expr) -> nodes.Node:
        try:
            node.as_const()
        except nodes.Impossible:
            return _filtered(self.generic_visit(node), _SIZED)
        return node


class _Clock:
    def __init__(self, seconds: float, since_s: float):
        self._seconds = seconds
        self._end_s = since_s + seconds
        self._num_ticks = 0

    def tick(self) -> None:
        self._num_ticks += 1
        if self._num_ticks % _TICKS_PER_LOOK == 0 and time.monotonic() > self._end_s:
            raise TemplateLimitError(f"it takes more than {self._seconds:g} seconds")


def _filtered(node: nodes.Node, name: str) -> nodes.Filter:
    assert isinstance(node, nodes.Expr)
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _check_arguments(arguments: tuple[Any, ...]) -> None:
    for value in arguments:
        if isinstance(value, int) and abs(value) > MAX_NUMBER:
            raise TemplateLimitError(f"it uses a number beyond {MAX_NUMBER}")
