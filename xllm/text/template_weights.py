"""`TemplateWeights`: counts how much a template's values hold, so that none is made that takes long to look at.

A list that holds itself many times over is small in memory and endless to compare, sort, hash or print; all of these
run to their end inside C, where no clock is looked at. So a value is weighed when it is made.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from jinja2.utils import Namespace

# In one value, each counted as often as it occurs. Chosen: bounds what runs inside C, where no clock is looked at.
MAX_VALUES = 2**19
MAX_DEPTH = 200  # of nesting. Chosen: below Python's limit on recursion, far beyond real conversations
# Values that one counts as. Chosen: it is weighed again each time, so that many of them in a value must count.
_OF_NAMESPACE = 512
_REMEMBERED = 16  # values from which a weight is kept. Chosen: counting fewer is as fast as looking the weight up
_MAX_REMEMBERED = 2**14  # weights kept. Chosen: bounds memory


class TemplateLimitError(Exception):
    """A template takes too long or makes too much."""


class TemplateWeights:
    """The weights of one rendering's values. A template cannot change lists and dicts, so their weight is kept; that of
    a namespace, which it can change, is never kept, nor that of a value that holds one.

    max_chars: characters that one value may have.
    """

    def __init__(self, max_chars: int):
        self._max_chars = max_chars
        self._known: dict[int, tuple[Any, int, int]] = {}  # by id, which the value that stands here keeps from reuse

    def check(self, value: Any) -> None:
        """Raise TemplateLimitError if the value is too much."""
        if isinstance(value, str):
            if len(value) > self._max_chars:
                raise TemplateLimitError(f"it makes a text of more than {self._max_chars} characters")
        elif isinstance(value, (list, tuple, Mapping, Namespace)):
            self._weigh(value, 0)

    def check_sum(self, left: Any, right: Any, result: Any) -> None:
        """`check(result)`, where it is two lists or tuples put together."""
        a, b = self._weigh(left, 0), self._weigh(right, 0)
        if a[2] and b[2]:
            self._keep(result, a[0] + b[0], a[1] + b[1])
        self._judge(a[0] + b[0], a[1] + b[1])

    def num_chars(self, value: Any) -> int:
        """Characters in a value, or in a text."""
        if isinstance(value, str):
            return len(value)
        return self._weigh(value, 0)[1] if isinstance(value, (list, tuple, Mapping, Namespace)) else 0

    def num_values(self, value: Any) -> int:
        return self._weigh(value, 0)[0] if isinstance(value, (list, tuple, Mapping, Namespace)) else 1

    def _weigh(self, container: Any, depth: int) -> tuple[int, int, bool]:
        """(values, characters, whether they stay what they are)."""
        if (known := self._known.get(id(container))) is not None:
            return known[1], known[2], True
        if depth > MAX_DEPTH:
            raise TemplateLimitError("it nests too deeply")
        stays = not isinstance(container, Namespace)
        num_values, num_chars = 1 if stays else _OF_NAMESPACE, 0
        for item in _parts(container):
            if isinstance(item, str):
                num_values += 1
                num_chars += len(item)
            elif isinstance(item, (list, tuple, Mapping, Namespace)):
                values, chars, item_stays = self._weigh(item, depth + 1)
                num_values, num_chars, stays = num_values + values, num_chars + chars, stays and item_stays
            else:
                num_values += 1
            if num_values > MAX_VALUES or num_chars > self._max_chars:
                break
        self._judge(num_values, num_chars)
        if stays and num_values >= _REMEMBERED:
            self._keep(container, num_values, num_chars)
        return num_values, num_chars, stays

    def _judge(self, num_values: int, num_chars: int) -> None:
        if num_values > MAX_VALUES or num_chars > self._max_chars:
            raise TemplateLimitError(f"it makes a value of more than {MAX_VALUES} values or {self._max_chars} "
                                     "characters")

    def _keep(self, container: Any, num_values: int, num_chars: int) -> None:
        if len(self._known) >= _MAX_REMEMBERED:
            self._known.clear()
        self._known[id(container)] = container, num_values, num_chars


def _parts(container: Any) -> Iterable[Any]:
    if isinstance(container, Namespace):
        container = object.__getattribute__(container, "_Namespace__attrs")
    if isinstance(container, Mapping):
        return (part for pair in container.items() for part in pair)
    return container  # type: ignore[no-any-return]
