"""No operator, filter, test or method of a template holds the interpreter for long, whatever it is given."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from jinja2.exceptions import TemplateError

from xllm.errors import ModelError, RequestError
from xllm.text.chat_template import ChatTemplate, _environment
from xllm.text.template_limits import MAX_NODES, MAX_TEXT_CHARS
from xllm.text.template_weights import MAX_VALUES, TemplateLimitError, TemplateWeights

BOUNDS_ALL = os.environ.get("BOUNDS_ALL") == "1"  # every text, list and argument; minutes
LONGEST_S = 0.25 if BOUNDS_ALL else 1.5  # that another thread waits for the interpreter; CI's machine is not ours alone
MANY = "{% set ns = namespace(a=[1]) %}{% for i in range(60) %}{% set ns.a = [ns.a, ns.a] %}{% endfor %}"
PAIRS = ("{% set ns = namespace(a=(1,), b=(1,)) %}{% for i in range(60) %}{% set ns.a = (ns.a, ns.a) %}"
         "{% set ns.b = (ns.b, ns.b) %}{% endfor %}")
DEEP = {
    "compare": PAIRS + "{{ ns.a == ns.b }}", "less": PAIRS + "{{ ns.a < ns.b }}",
    "member": PAIRS + "{{ ns.a in [ns.b] }}", "key": PAIRS + "{{ {ns.a: 1} | length }}",
    "lookup": PAIRS + "{{ {(1,): 1}[ns.a] }}", "sort": PAIRS + "{{ [ns.a, ns.b] | sort | length }}",
    "unique": PAIRS + "{{ [ns.a, ns.b] | unique | list | length }}", "min": PAIRS + "{{ [ns.a, ns.b] | min | length }}",
    "index": PAIRS + "{{ [ns.a].index(ns.b) }}", "count": PAIRS + "{{ [ns.a].count(ns.b) }}",
    "eq-test": PAIRS + "{{ ns.a is eq ns.b }}", "in-test": PAIRS + "{{ ns.a is in [ns.b] }}",
    "select": PAIRS + "{{ [ns.a] | select('equalto', ns.b) | list | length }}",
    "dict": "{% set ns = namespace(a={}) %}{% for i in range(60) %}{% set ns.a = {'x': ns.a, 'y': ns.a} %}{% endfor %}"
            "{{ ns.a == ns.a }}",
    "plus": "{% set ns = namespace(a=[1]) %}{% for i in range(60) %}{% set ns.a = [ns.a] + [ns.a] %}{% endfor %}x",
    "call": "{% set ns = namespace(a={}) %}{% for i in range(60) %}{% set ns.a = dict(x=ns.a, y=ns.a) %}{% endfor %}x",
    "varargs": "{% macro m(n) %}{% if n %}{{ m(n - 1, varargs, varargs) }}{% else %}{{ varargs == varargs }}{% endif %}"
               "{% endmacro %}{{ m(60, 1) }}",
    "filters": "{% set ns = namespace(a=[1]) %}{% for i in range(60) %}{% set ns.a = [ns.a, ns.a] | list %}"
               "{% endfor %}x",
    "namespaces": "{% set ns = namespace(a=1) %}{% for i in range(60) %}{% set b = namespace(x=ns.a, y=ns.a) %}"
                  "{% set ns.a = b %}{% endfor %}{{ ns.a }}",
    "itself": "{% set ns = namespace(a=1) %}{% set ns.a = ns %}{{ ns }}",
    "later": "{% set ns = namespace(a=1) %}{% set l = [ns] * 1000 %}{% set ns.a = ['y' * 10000] * 10000 %}{{ l }}",
    "sum": "{{ ([[1]] * 200000) | sum(start=[]) | length }}",
    "literal": "{% set a = range(9999) | list %}{{ [[a, a, a, a] * 99, [a, a] * 99] == 1 }}",
}


def render(source: str, **variables: Any) -> str:
    return ChatTemplate(source, {}).render([{"role": "user", "content": "x"}], max_seconds=5.0, **variables)


@contextmanager
def watched() -> Iterator[list[float]]:
    """Afterwards the longest time for which this thread could not run another one."""
    gaps, over = [0.0], threading.Event()

    def watch() -> None:
        last = time.monotonic()
        while not over.is_set():
            time.sleep(0.001)
            now = time.monotonic()
            gaps[0] = max(gaps[0], now - last)
            last = now

    watcher = threading.Thread(target=watch)
    before, _ = sys.getswitchinterval(), sys.setswitchinterval(0.001)
    watcher.start()
    try:
        yield gaps
    finally:
        over.set()
        watcher.join()
        sys.setswitchinterval(before)


@pytest.mark.parametrize("source", DEEP.values(), ids=DEEP)
def test_values_that_hold_themselves_many_times_over(source: str) -> None:
    started_s = time.monotonic()
    with watched() as gaps, pytest.raises(RequestError, match=r"it (makes|nests|adds)"):
        render(source)
    assert gaps[0] < LONGEST_S and time.monotonic() - started_s < 4


TEXTS = {"same": "a" * MAX_TEXT_CHARS, "words": "ab " * (MAX_TEXT_CHARS // 3), "tags": "<!-->" * (MAX_TEXT_CHARS // 5)}
ARGUMENTS: list[tuple[Any, ...]] = [(), ("a" * 2**20 + "b",), ("a", "b" * 64), (64,)]
LISTS = {"numbers": list(range(MAX_VALUES - 1)), "pairs": [(i, str(i)) for i in range(MAX_VALUES // 3 - 1)],
         "dicts": [{"a": i} for i in range(MAX_VALUES // 3 - 1)]}


class Caller:
    """Calls filters and methods as a template does."""

    def __init__(self) -> None:
        self.environment = _environment()
        self._context = self.environment.from_string("").new_context()
        self.filters = [name for name in self.environment.filters if not name.startswith("xllm_")]

    def filter(self, name: str, *arguments: Any) -> Any:
        function = self.environment.filters[name]
        own = {"context": self._context, "environment": self.environment, "eval_context": self._context.eval_ctx}
        passed = getattr(function, "jinja_pass_arg", None)
        return function(*([own[passed.name]] if passed else []), *arguments)

    def method(self, name: str, text: str, *arguments: Any) -> Any:
        return self.environment.call(self._context, self.environment.getattr(text, name), *arguments)

    def longest_gap_s(self, function: Any, *arguments: Any) -> float:
        """Whatever is wrong with the arguments is fine, as long as it is said at once."""
        wrong = (TemplateLimitError, TypeError, ValueError, LookupError, AttributeError, OverflowError, TemplateError)
        with self.environment.limited(60.0, time.monotonic()), watched() as gaps, contextlib.suppress(*wrong):
            function(*arguments)
        return gaps[0]


@pytest.mark.parametrize("kind", TEXTS if BOUNDS_ALL else ["words"])
def test_filters_and_methods_of_the_longest_text(kind: str) -> None:
    """Every one that there is, with arguments of each kind, on the longest text that can be."""
    caller, text, slow = Caller(), TEXTS[kind], []
    methods = [name for name in dir(text) if not name.startswith("_")]
    arguments_of_all = ARGUMENTS if BOUNDS_ALL else ARGUMENTS[:1]
    for call, names in ((caller.filter, caller.filters), (caller.method, methods)):
        for name in names:
            for arguments in arguments_of_all:
                gap_s = caller.longest_gap_s(call, name, text, *arguments)
                if gap_s > LONGEST_S:
                    slow.append((name, [str(a)[:9] for a in arguments], round(gap_s, 2)))
    assert not slow


@pytest.mark.parametrize("kind", LISTS if BOUNDS_ALL else ["pairs"])
def test_filters_of_the_largest_list(kind: str) -> None:
    caller, slow = Caller(), []
    for name in caller.filters:
        for arguments in ((), ("a",), (64,)) if BOUNDS_ALL else ((),):
            gap_s = caller.longest_gap_s(caller.filter, name, LISTS[kind], *arguments)
            if gap_s > LONGEST_S:
                slow.append((name, arguments, round(gap_s, 2)))
    assert not slow


@pytest.mark.parametrize("source", ["{{ '%(a)s' * 1000 % {'a': 'x' * 10000000} }}",
                                    "{{ ('{0}' * 1000).format('x' * 10000000) }}",
                                    "{{ ('%(a)s' * 1000) | format(a='x' * 10000000) }}",
                                    "{% set s = 'x' * 30000000 %}{{ (" + " ~ ".join("s" * 200) + ") | length }}",
                                    "{{ ('\n' * 9000000) | indent(64) | length }}",
                                    "{{ ('\t' * 9000000).expandtabs(64) | length }}",
                                    "{{ ('a b ' * 8000000).split() | length }}",
                                    "{{ ('a' * 9000000).rfind('b' + 'a' * 4000000) }}",
                                    "{{ ('a' * 30000000).strip('b' * 9000000) }}",
                                    "{{ ('a' * 9000000).join('b' * 9000000) }}",
                                    "{{ ('a' * 9000000) | join('b' * 9000000) }}",
                                    "{% set s = 'x' * 9000000 %}{{ [s, s, s, s] | map('trim') | join }}",
                                    "{% set s = 'x' * 9000000 %}{{ ','.join([s, s, s, s] | map('trim')) }}",
                                    "{{ (range(90000) | list) | tojson(indent=64) }}"])
def test_small_words_that_would_make_much(source: str) -> None:
    started_s = time.monotonic()
    with watched() as gaps, pytest.raises(RequestError, match="it "):
        render(source)
    assert gaps[0] < LONGEST_S and time.monotonic() - started_s < 4


def test_a_template_that_is_long_to_compile() -> None:
    with pytest.raises(ModelError, match="expressions"):
        ChatTemplate("{{ a }}" * MAX_NODES, {})
    with watched() as gaps:
        ChatTemplate("{{ a[b] }}" * (MAX_NODES // 6), {})
    assert gaps[0] < max(1.0, LONGEST_S)


def test_what_is_weighed_once_is_weighed_no_more() -> None:
    """Conversations that grow by `+` in a loop, as templates write it, cost no more than their length."""
    source = ("{% set ns = namespace(m=[]) %}{% for m in messages %}{% set ns.m = ns.m + [m] %}{% endfor %}"
              "{{ ns.m | length }}")
    messages = [{"role": "user", "content": "x", "tool_calls": []} for _ in range(4096)]
    source = source.replace("{{", "{% for m in ns.m %}{{ m.content }}{% endfor %}{{")
    started_s = time.monotonic()
    assert ChatTemplate(source, {}).render(messages) == "x" * 4096 + "4096"
    assert time.monotonic() - started_s < 3
    weights = TemplateWeights(1000)
    inner = ["ab"] * 20
    weights.check([inner] * 20)
    assert (weights.num_values([inner] * 2), weights.num_chars([inner] * 2)) == (43, 80)
    with pytest.raises(TemplateLimitError):
        weights.check([inner] * 26)
