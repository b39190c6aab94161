"""Mistakes in regular expressions that Rust's `regex` crate lets pass, wherever a form holds one."""

from __future__ import annotations

import json
import re

import pytest

from xllm import StructuredOutput
from xllm.errors import RequestError
from xllm.structured.grammar import build_matcher, grammar_text
from xllm.structured.regexes import RegexError, check_regex, json_regex

# The position of the mistake. Python refuses all but the last six as well, or means something else by them.
MISTAKES = {"foo**": 4, "a+*": 2, "a*+": 2, "a++": 2, "a{2}{3}": 4, "a{2}*": 4, "a???": 3, "a*??": 3, "[*]+*": 4,
            "(a)**": 4, r"\**+": 3, r"\p{L}+*": 6, r"\x{41}**": 7, "(?i:a)+*": 7, "^*a": 1,
            "a|*": 2, "(*a)": 1, "(?i)*": 4, "*": 0,
            "a{ 2 }": 1, "a{2 ,3}": 1, "[]": 0, "[]a]": 0, "[^]": 0, "b[^]a]": 1}
FINE = ["a*", "a*?", "a??", "a{2}?", "a{2,}", "a{2,3}?", "(a*)*", "(?:a+)?", "(a{2}){3}", r"\*+", r"\**", "[*+?]+",
        r"[\]]*", r"[^\]]+", r"\p{L}{2}", r"\pL+", r"\x41*", r"\u0041+", "(?P<name>a)*", "(?<name>a)+", "(?i:a)*",
        "(a|)*", "()", "a|b", "^a*$", "(?x) a  # two: **", r"\\*", r"\(*", "]", "}"]
ONLY_JSON = {"[[a]b]": 1, "[a&&b]": 2, "[a--b]": 2, "[a~~b]": 2, "[[:alpha:]]": 1}


@pytest.mark.parametrize("read", [check_regex, json_regex])
@pytest.mark.parametrize("pattern", MISTAKES)
def test_a_mistake_is_found_where_it_is(read, pattern):
    with pytest.raises(RegexError, match=rf"^position {MISTAKES[pattern]} of"):
        read(pattern)


@pytest.mark.parametrize("pattern", FINE)
def test_what_is_fine_passes(pattern):
    check_regex(pattern)
    json_regex(pattern)


@pytest.mark.parametrize("pattern", ONLY_JSON)
def test_classes_of_the_crate_are_none_of_a_schema(pattern):
    """ECMA-262 takes these signs for themselves."""
    check_regex(pattern)
    with pytest.raises(RegexError, match=rf"^position {ONLY_JSON[pattern]} of"):
        json_regex(pattern)


FORMS = {
    "regex": {"regex": "foo**"},
    "regex-behind": {"regex": "foo**", "after": "</think>"},
    "pattern": {"json": {"properties": {"a": {"type": "string", "pattern": "foo**"}}}},
    "name": {"json": {"patternProperties": {"foo**": {}}}},
    "item-behind-a-reference": {"json": {"$defs": {"s": {"type": "string", "pattern": "foo**"}}, "type": "array",
                                         "items": {"$ref": "#/$defs/s"}}},
    "lark": {"grammar": 'start: "a" X\nX: /foo**/'},
    "lark-inside": {"grammar": "start: %lark {\nstart: /foo**/\n}"},
    "schema-in-lark": {"grammar": 'start: "x" %json {"type": "string", "pattern": "foo**"}'},
    "tag": {"structural_tag": {"triggers": ["<"], "structures": [
        {"begin": "<a>", "schema": {"properties": {"x": {"type": "string", "pattern": "foo**"}}}, "end": "</a>"}]}},
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_every_form_refuses_it(checker, form):
    kind = next(iter(form))
    with pytest.raises(RequestError, match="position 4 of the regular expression, in 'foo") as caught:
        checker.check(StructuredOutput(**form))
    assert caught.value.field == kind


@pytest.mark.parametrize("grammar", ['start: "a**" // b** /c**/ \n', '# /a**/\nstart: "b"', r'start: /a\/b/ "//"',
                                     'root ::= [*]+ "**" # c**', 'start: "x" %json {"const": "/a**/"}',
                                     'start: %json {"type": "string", "pattern": "^[^\\"]{1,3}$"} "!"'])
def test_what_looks_like_one_in_a_grammar_is_none(checker, grammar):
    checker.check(StructuredOutput(grammar=grammar))


CHARACTERS = ['"', "\\", "/", "a", "\n", "\t", "\x08", "\x1f", "ü", " "]


@pytest.mark.parametrize("pattern", ['^[^"]$', r"^[^\\]$", r'^[^"\\]$', '^[^<>"]$', r"^[\x00-\x1f]$", r"^[\s\S]$",
                                     r"^[^\n]$", r"^[^\x00-!]$", r"^[\x00-!]$", "^[^a-z]$", r"^\S$"])
def test_a_class_holds_what_it_says_and_no_more(source, pattern):
    """llguidance writes the quote and the backslash for a class of all control characters that excludes them."""
    vocabulary = source.build()
    tokens = {bytes.fromhex(token): token_id for token_id, token in enumerate(source.token_bytes)}
    start = build_matcher(vocabulary, grammar_text(StructuredOutput(json={"type": "string", "pattern": pattern})))
    wrong = []
    for character in CHARACTERS:
        matcher = start.deep_copy()
        text = json.dumps(character, ensure_ascii=False).encode()
        taken = all(matcher.consume_token(tokens[bytes([byte])]) for byte in text) and matcher.is_accepting()
        # Python counts \x1c to \x1f as blanks.
        if taken != bool(re.search(pattern, character)) and (pattern, character) != (r"^\S$", "\x1f"):
            wrong.append(character)
    assert wrong == []
