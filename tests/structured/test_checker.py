"""Hostile grammars end with a reason, within the limits, and harm nobody else."""

from __future__ import annotations

import os
import time

import psutil
import pytest

from xllm import StructuredOutput
from xllm.errors import RequestError
from xllm.structured import checker as module
from xllm.structured.checker import WALL_TIMEOUT_S, GrammarBusyError, GrammarChecker

S = StructuredOutput
PATIENCE_S = WALL_TIMEOUT_S + 5  # the limit on CPU time comes late where others use the cores


def chain(length: int) -> str:
    """A grammar whose rules refer to each other in a ring: deep recursion for whoever walks it naively."""
    rules = [f'r{i}: "x{i}" r{(i + 1) % length}' for i in range(length)]
    return "start: " + " | ".join(f"r{i}" for i in range(length)) + "\n" + "\n".join(rules)


HOSTILE = {
    "nested-counts": S(regex="((a{1000}){1000}){1000}"),
    "too-many-states": S(regex=r"(\p{L}|\p{N}|[^\x00-\x{10FFFE}])*" * 40),
    "nested-groups": S(regex="(" * 3000 + "a" + ")" * 3000),
    "no-regex": S(regex="(a"),
    "look-ahead": S(regex="(?=a)b"),
    "back-reference": S(regex=r"(a)\1"),
    "endless": S(grammar='start: "a" start'),
    "nothing": S(grammar="start: start"),
    "unknown-rule": S(grammar="start: rule"),
    "no-grammar": S(grammar="hello"),
    "nested-rule": S(grammar="start: " + "(" * 50_000 + '"a"' + ")" * 50_000),
    "nested-gbnf": S(grammar="root ::= " + "(" * 5000 + '"a"' + ")" * 5000),
    "ring": S(grammar=chain(3000)),
    "huge-count": S(grammar='start: a{1000000}\na: "x"{1000000}'),
    "itself": S(json={"$ref": "#"}),
    "each-other": S(json={"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}),
    "elsewhere": S(json={"$ref": "http://169.254.169.254/latest"}),
    "file": S(json={"$ref": "file:///etc/passwd"}),
    "product": S(json={"allOf": [{"anyOf": [{"properties": {f"k{i}_{j}": {"type": "string"}}} for j in range(3)]}
                                 for i in range(12)]}),
    "big-multiple": S(json={"type": "integer", "multipleOf": 9_999_991}),
    "heavy-multiple": S(json={"type": "integer", "multipleOf": 99_991}),
    "contradiction": S(json={"type": "string", "minLength": 5, "maxLength": 2}),
    "impossible": S(json={"type": "object", "properties": {"a": False}, "required": ["a"]}),
    "not": S(json={"not": {"type": "string"}}),
    "patterns": S(json={"patternProperties": {"^.*(a.*){20}$": {"type": "string"}, "^.*(b.*){20}$": {}}}),
    "wrong-type": S(json={"type": "strin"}),
    "no-structures": S(structural_tag={"structures": [], "triggers": ["<"]}),
    "bad-behind": S(regex="(a", after="</think>"),
    "no-trigger": S(structural_tag={"structures": [{"begin": "<a>", "schema": {}}], "triggers": ["<b"]}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_ones_end_with_a_reason(checker, name):
    spec, began_s = HOSTILE[name], time.monotonic()
    with pytest.raises(RequestError) as caught:
        checker.check(spec)
    assert time.monotonic() - began_s < PATIENCE_S
    assert caught.value.field == spec.kind
    assert len(str(caught.value)) < 600
    if name in ("heavy-multiple", "ring"):
        assert "memory" in str(caught.value)
    checker.check(S(choice=["still", "there"]))


WIDE = {
    "many-values": S(json={"enum": [f"value {i} of many" for i in range(5000)]}),
    "fan": S(json={"$defs": {f"d{i}": {"type": "object", "required": ["a", "b", "c"],
                                       "properties": {name: {"$ref": f"#/$defs/d{i + 1}"} for name in "abc"}}
                             for i in range(40)} | {"d40": {"type": "string"}}, "$ref": "#/$defs/d0"}),
    "many-names": S(json={"type": "object", "properties": {f"name{i}": {"type": "string"} for i in range(500)}}),
    "many-choices": S(choice=[f"choice {i}" for i in range(4096)]),
    "long-string": S(json={"type": "string", "minLength": 100_000}),
    "tree": S(json={"$defs": {"node": {"type": "object", "properties": {
        "children": {"type": "array", "items": {"$ref": "#/$defs/node"}}}}}, "$ref": "#/$defs/node"}),
    "ambiguous": S(regex="(a|a)*(a+)+b"),
    "behind": S(json="object", after="</think>"),
    "gbnf": S(grammar='root ::= "yes" | "no" [0-9]+'),
    "lark": S(grammar='start: "a" start "b" | NAME\nNAME: /[a-z]+/'),
    "tag": S(structural_tag={"structures": [{"begin": "<f=a>", "schema": {"type": "object"}, "end": "</f>"}],
                             "triggers": ["<f="]}),
}


@pytest.mark.parametrize("spec", WIDE.values(), ids=WIDE)
def test_large_ones_that_are_fine_pass(checker, spec):
    checker.check(spec)


def test_a_verdict_is_remembered_and_no_more_than_so_many(source, monkeypatch):
    monkeypatch.setattr(module, "MAX_REMEMBERED", 3)
    checker = GrammarChecker(lambda: source)
    specs = [S(regex=f"a{{{i}}}") for i in range(1, 8)]
    asked = []
    ask = checker._ask
    monkeypatch.setattr(checker, "_ask", lambda spec: asked.append(spec) or ask(spec))
    for spec in [*specs, specs[-1], specs[-2]]:
        checker.check(spec)
    assert asked == specs
    assert len(checker._verdicts) == 3
    checker.check(specs[0])
    assert asked == [*specs, specs[0]]
    checker.close()


def test_more_than_so_many_at_a_time_are_turned_away(source, monkeypatch):
    monkeypatch.setattr(module, "MAX_WAITING", 4)
    checker = GrammarChecker(lambda: source)
    waiting = [checker.submit(S(regex=f"b{{{i}}}")) for i in range(1, 5)]
    with pytest.raises(GrammarBusyError):
        checker.submit(S(regex="c"))
    for one in waiting:
        one.result()
    checker.check(S(regex="c"))
    checker.close()


def test_one_that_takes_too_long_holds_up_nobody_else(source, monkeypatch):
    monkeypatch.setattr(module, "WALL_TIMEOUT_S", 250.0)  # it is the limit on CPU time that ends it
    checker = GrammarChecker(lambda: source)
    slow = checker.submit(S(json={"type": "integer", "multipleOf": 99_999_989}))
    checker.check(S(regex="[0-9]+"))
    assert not slow.done()
    with pytest.raises(RequestError, match="to compile"):
        slow.result(timeout=60)
    checker.close()


def test_where_the_limit_on_cpu_time_does_not_come_the_clock_does(source, monkeypatch):
    checker = GrammarChecker(lambda: source)
    checker.check(S(regex="a"))
    monkeypatch.setattr(module, "WALL_TIMEOUT_S", 0.2)
    with pytest.raises(RequestError, match="to compile"):
        checker.check(S(json={"type": "integer", "multipleOf": 99_999_989}))
    monkeypatch.undo()
    checker.check(S(regex="b"))
    checker.close()


def test_processes_end_with_the_checker(source):
    before = set(psutil.Process(os.getpid()).children())
    checker = GrammarChecker(lambda: source)
    checker.check(S(regex="a"))
    mine = set(psutil.Process(os.getpid()).children()) - before
    assert len(mine) == 1
    checker.close()
    assert not any(process.is_running() for process in mine)
    with pytest.raises(RequestError, match="shut down"):
        checker.check(S(regex="b"))


def test_a_process_that_was_killed_is_started_again(source):
    before = set(psutil.Process(os.getpid()).children())
    checker = GrammarChecker(lambda: source)
    checker.check(S(regex="a"))
    (mine,) = set(psutil.Process(os.getpid()).children()) - before
    mine.kill()
    mine.wait()
    checker.check(S(regex="b"))
    checker.close()
