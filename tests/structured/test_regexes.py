"""Mistakes in regular expressions that Rust's `regex` crate lets pass, wherever a form holds one."""

from __future__ import annotations

import json
import re

import pytest

from xllm import StructuredOutput
from xllm.errors import RequestError
from xllm.structured.ecma import rust_pattern
from xllm.structured.grammar import build_matcher, grammar_text
from xllm.structured.regexes import RegexError, check_regex

# The position of the mistake. Python refuses them as well, or means something else by them.
MISTAKES = {"foo**": 4, "a+*": 2, "a*+": 2, "a++": 2, "a{2}{3}": 4, "a{2}*": 4, "a???": 3, "a*??": 3, "[*]+*": 4,
            "(a)**": 4, r"\**+": 3, r"\p{L}+*": 6, r"\x{41}**": 7, "(?i:a)+*": 7, "^*a": 1,
            "a|*": 2, "(*a)": 1, "(?i)*": 4, "*": 0}
# Where the crate and ECMA-262 each mean something of their own. Python takes the classes that the crate takes.
AMBIGUOUS = {"a{ 2 }": 1, "a{2 ,3}": 1, "[]": 0, "[]a]": 0, "[^]": 0, "b[^]a]": 1, "[a-z[]+": 4}
FINE = ["a*", "a*?", "a??", "a{2}?", "a{2,}", "a{2,3}?", "(a*)*", "(?:a+)?", "(a{2}){3}", r"\*+", r"\**", "[*+?]+",
        r"[\]]*", r"[^\]]+", r"\p{L}{2}", r"\pL+", r"\x41*", r"\u0041+", "(?P<name>a)*", "(?<name>a)+", "(?i:a)*",
        "(a|)*", "()", "a|b", "^a*$", "(?x) a  # two: **", r"\\*", r"\(*", "]", "}"]
OF_THE_CRATE = ["[[a]b]", "[a&&b]", "[a--b]", "[a~~b]", "[[:alpha:]]", r"\x{41}", "(?x) a", "(?i)a"]
ONLY_ECMA = {r"(a)\1": 3, r"(?<n>a)\k<n>": 7, r"a\b": 1, r"\B": 0, "(?=a)b": 0, "a(?!b)": 1, "(?<=a)b": 0, "(?<!a)b": 0,
             "[b-a]": 1, r"[\w-a-]z(": 8, "a)": 1, "a[b": 1, "a{3,2}": 1, r"\01": 0, r"\e": 0, r"a\h": 1, r"[\a]": 1,
             "\\": 0, r"\xg": 0, r"\u12": 0, r"\ud83d": 0, r"\u{110000}": 0, "(?": 0, "(?~a)": 0,
             r"\ud83d\udezz": 0, "a{9999999999}": 1}


@pytest.mark.parametrize("read", [check_regex, rust_pattern])
@pytest.mark.parametrize("pattern", MISTAKES)
def test_a_mistake_is_found_where_it_is(read, pattern):
    with pytest.raises(RegexError, match=rf"^position {MISTAKES[pattern]} of"):
        read(pattern)


@pytest.mark.parametrize("pattern", FINE)
def test_what_is_fine_passes(pattern):
    check_regex(pattern)
    rust_pattern(pattern)


@pytest.mark.parametrize("pattern", AMBIGUOUS)
def test_an_expression_of_two_meanings_is_refused(pattern):
    with pytest.raises(RegexError, match=rf"^position {AMBIGUOUS[pattern]} of"):
        check_regex(pattern)
    rust_pattern(pattern)


@pytest.mark.parametrize("pattern", OF_THE_CRATE)
def test_the_syntax_of_the_crate_passes(pattern):
    check_regex(pattern)


@pytest.mark.parametrize("pattern", ONLY_ECMA)
def test_what_a_schema_cannot_say_is_found_where_it_is(pattern):
    with pytest.raises(RegexError, match=rf"^position {ONLY_ECMA[pattern]} of") as caught:
        rust_pattern(pattern)
    assert repr(pattern[:12])[1:-1] in str(caught.value)


def test_a_bracket_within_a_class_is_called_what_it_is():
    with pytest.raises(RegexError, match="a bracket within a class begins another class"):
        check_regex("[a-z[]+")


# What ECMA-262 means by a pattern: texts that it matches, and texts that it does not.
MEANINGS = {
    "^[a-z[]$": (["a", "["], ["]", "A"]),
    "^[+--]$": (["+", ",", "-"], [".", "*"]),
    "^[--/]$": (["-", ".", "/"], [","]),
    "^[a&&b]$": (["a", "b", "&"], ["c"]),
    "^[a~~b]$": (["a", "~"], ["c"]),
    "^[[a]b]$": (["[b]", "ab]"], ["a", "b"]),
    "^[[:alpha:]]$": (["[]", ":]", "p]"], ["a", "b]"]),
    r"^{\w+}$": (["{a_1}"], ["{}", "a"]),
    "^a{,3}$": (["a{,3}"], ["aa"]),
    "^a{ 2 }$": (["a{ 2 }"], ["aa"]),
    "^a{1$": (["a{1"], ["a"]),
    "^x{2}}$": (["xx}"], ["xx"]),
    r"^\cA$": (["\x01"], ["A"]),
    r"^\c1$": ([r"\c1"], ["c1"]),
    r"^[\b]$": (["\b"], ["b"]),
    r"^a|\0$": (["a"], ["b"]),
    r"^[a-\d]$": (["a", "-", "5"], ["b"]),
    r"^[\d-x]$": (["7", "-", "x"], ["y"]),
    "^[^]$": (["a", "\n", "é", '"'], [""]),
    "^(?:[]a]|b)$": (["b"], ["a]", "]"]),
    r"^\u0041\x42\u{43}$": (["ABC"], ["abc"]),
    r"^\ud83d\ude00$": (["\U0001f600"], ["a"]),
    r"^[\u00e0-\u00ff]$": (["é"], ["e"]),
    r"^\p{Lu}\P{L}$": (["É1"], ["é1", "ÉÉ"]),
    r"^\_\-\/\#\ä$": (["_-/#ä"], ["_-/#a"]),
    "^.$": (["a", "\t", "\x85"], ["\n", "\r", "\u2028", ""]),
    "^(?s:.)$": (["a", "\n"], [""]),
    r"^\s\S$": ([" a", "\u00a0x"], ["aa", " \n"]),
    r"^[^\S ]$": (["\t"], [" ", "a"]),
    r"^\D\W$": (["a!", "é\""], ["1!", "a_"]),
    "^(?<year>[0-9]{4})$": (["2026"], ["26"]),
    "^(?i:a)b$": (["Ab"], ["AB"]),
    r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$": (["1", "-0.5", "+.5", "5."], ["", ".", "+", "-.", "1.2.3"]),
    r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d{0,2}0*$": (["1", "0.5", ".25", "5.", "1.2500", ".0"], ["", ".", "0.125"]),
}


@pytest.mark.parametrize("pattern", MEANINGS)
def test_a_pattern_is_read_as_ecma_262_has_it(source, pattern):
    vocabulary = source.build()
    tokens = {bytes.fromhex(token): token_id for token_id, token in enumerate(source.token_bytes)}
    start = build_matcher(vocabulary, grammar_text(StructuredOutput(json={"type": "string", "pattern": pattern})))

    def takes(text: str) -> bool:
        matcher = start.deep_copy()
        written = json.dumps(text, ensure_ascii=False).encode()
        return all(matcher.consume_token(tokens[bytes([byte])]) for byte in written) and matcher.is_accepting()

    good, bad = MEANINGS[pattern]
    assert [text for text in good if not takes(text)] == []
    assert [text for text in bad if takes(text)] == []


@pytest.mark.parametrize(("schema", "message"), [
    ({"type": "string", "pattern": r"^[a-z]+\d+$x"}, r"/pattern: the regular expression '^[a-z]+\\d+$x': ^ and $ can"),
    ({"type": "object", "properties": {"x": {"type": "string", "pattern": "^[]$"}}, "required": ["x"]},
     "/properties/x/pattern: the regular expression '^[]$': no text matches it"),
    ({"properties": {"x": {"type": "string", "pattern": r"\p{Nonsense}\s"}}},
     r"/properties/x/pattern: the regular expression '\\p{Nonsense}\\s': Unicode property not found"),
], ids=["anchor", "empty", "property"])
def test_a_refusal_shows_the_expression_as_it_came(checker, schema, message):
    with pytest.raises(RequestError) as caught:
        checker.check(StructuredOutput(json=schema))
    assert str(caught.value).startswith(f"json: {message}")
    with pytest.raises(RequestError) as caught:
        checker.check(StructuredOutput(grammar=f'start: "x" %json {json.dumps(schema)}'))
    assert str(caught.value).startswith(f"grammar: {message}")


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
