"""`JsonScanner` against Python's own parser."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.parsers.json_scan import JsonScanner

FRAGMENTS = ["{", "}", "[", "]", ",", ":", '"', '"a"', '"a": ', '"b":1', "1", "-", "0", "1.5", "1e9", ".", "e", "+",
             "true", "false", "null", "NaN", "Infinity", " ", "\n", "\t", "\\", '\\"', "\\n", "\\u00e9", "\\ud83d",
             "é😀", "x", "[[", "]]", '{"k":', "[1,", "'"]


def scan(text: str, pieces: list[str]) -> tuple[str, str, bool]:
    """(what was passed on, what was not read, whether a value is complete)."""
    scanner, out, rest = JsonScanner(), "", ""
    for piece in pieces:
        rest += piece
        if not scanner.done and not scanner.failed:
            passed, end = scanner.advance(rest, 0)
            out, rest = out + passed, rest[end:]
    if not scanner.done and not scanner.failed:
        out += scanner.finish()
    return out, rest, scanner.done


def reads(text: str) -> bool:
    """Whether Python reads it as one JSON value; with NaN and the like it is more liberal than the standard."""

    def refuse(word: str) -> None:
        raise ValueError(word)

    try:
        json.loads(text, parse_constant=refuse)
    except ValueError:
        return False
    return True


@settings(max_examples=1500, deadline=None, derandomize=True, database=None)
@given(st.lists(st.sampled_from(FRAGMENTS), max_size=9))
def test_agrees_with_python(parts: list[str]) -> None:
    text = "".join(parts)
    out, rest, done = scan(text, [text])
    assert scan(text, list(text)) == (out, rest, done)
    if reads(text):
        assert done
        assert not rest.strip()
        assert json.loads(out) == json.loads(text)
    if done:
        assert reads(out)
        assert json.loads(out, strict=False) == json.JSONDecoder(strict=False).raw_decode(out.lstrip(" \t\n\r"))[0]
    if not done:
        assert not reads(text)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
                    | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=12),
       st.booleans(), st.sampled_from([None, 2]))
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
def test_passes_all_json_unchanged(value: object, escaped: bool, indent: int | None) -> None:
    text = json.dumps(value, ensure_ascii=escaped, indent=indent)
    assert scan(text, list(text)) == (text, "", True)
    assert scan(text, [text + " more"]) == (text, " more", True)


@pytest.mark.parametrize(("text", "meaning"), [
    ('"one\ntwo\r\t\x00"', "one\ntwo\r\t\x00"), (r'"\d+\. \_"', r"\d+\. \_"), (r'"\u00zz"', r"\u00zz"),
    (r'"\u12"', r"\u12"), (r'"\uD83D\uDE00"', "😀"), (r'{"\x": "\'"}', {r"\x": r"\'"}),
])
def test_slips_are_mended(text: str, meaning: object) -> None:
    for pieces in ([text], list(text)):
        out, rest, done = scan(text, pieces)
        assert (json.loads(out), rest, done) == (meaning, "", True)


@pytest.mark.parametrize(("text", "read"), [
    ("[1}", "[1"), ('{"a" 1}', '{"a" '), ("{a: 1}", "{"), ("[,]", "["), ('{"a": 01}', '{"a": 01'), ("[1,]", "[1,"),
    ("[1.]", "[1."), ("nul", "nul"), ("{'a': 1}", "{"), ('[{"a": tru}]', '[{"a": tru'),
])
def test_stops_where_it_turns_wrong(text: str, read: str) -> None:
    for pieces in ([text], list(text)):
        out, rest, done = scan(text, pieces)
        assert (out, rest, done) == (read, text[len(read):], False)
