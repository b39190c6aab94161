r"""`rust_pattern`: from ECMA-262's regular expressions, which JSON Schema's `pattern` is in, to the `regex` crate's.

The grammar is ECMA-262's (2025, 22.2.1 with Annex B.1.2): `[` and `&&` within a class stand for themselves, and a brace
that counts nothing does too. What the crate can do and ECMA-262 has no other meaning for is taken as well: `(?i)`,
`(?P<name>...)`, `\A`, `\z`, `\x{41}`, `\pL`. Not taken are look-around, back-references and octal escapes, and escaped
letters without a meaning: what they would stand for differs from one language to the next.
"""

from __future__ import annotations

import re

from xllm.structured.regexes import RegexError, mistake

_ANY, _NONE = r"[[\x00-\x{10FFFF}]--\x00]", "[a&&b]"
_WORD, _DIGIT = "0-9A-Za-z_", "0-9"
_BLANK = r"\x{9}-\x{d}\x{20}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}"
_MARK = r"\x{feff}"  # a blank to ECMA-262 alone: neither \s nor \S writes it
_SETS = {"d": f"[{_DIGIT}]", "D": f"[^{_DIGIT}]", "w": f"[{_WORD}]", "W": f"[^{_WORD}]", "s": f"[{_BLANK}]",
         "S": f"[^{_BLANK}{_MARK}]"}
_CONTROLS = {"t": "\t", "n": "\n", "v": "\v", "f": "\f", "r": "\r"}
_DOT = r"[^\x{a}\x{d}\x{2028}\x{2029}]"
_COUNT = re.compile(r"\{[0-9]+(?:,[0-9]*)?\}")
_MAX_COUNT_DIGITS = 9  # of a repetition's count: below 2^32, beyond which the `regex` crate cannot read it
_PROPERTY = re.compile(r"\\[pP](?:\{[^{}]+\}|[A-Za-z])")
_HEX = "[0-9a-fA-F]"
_CODE = re.compile(rf"\\(?:x({_HEX}{{2}})|[xu]\{{({_HEX}+)\}}|u([dD][89abAB]{_HEX}{{2}})\\u([dD][c-fC-F]{_HEX}{{2}})"
                   rf"|u({_HEX}{{4}}))")
_GROUP = re.compile(r"\((?:\?(?:P?<[^\W\d]\w*>|:|(?P<flags>[a-zA-Z-]+)(?P<end>[:)])))?")
_LOOK_AROUND = ("(?=", "(?!", "(?<=", "(?<!")
_MAX_CODE = 0x10FFFF  # the last code point of Unicode

# What pydantic 2 wrote for a Decimal: digits, of which the look-ahead says that there is one at least.
_DECIMAL = re.compile(r"\^\(\?!\^\[-\+\.\]\*\$\)\[\+-\]\?0\*\\d\*\\\.\?\\d(?:\*|\{0,([1-9]\d*)\}0\*)\$")


def rust_pattern(pattern: str) -> str:
    """The pattern as llguidance must be given it. Raises RegexError, which shows the pattern as it came.

    A class that holds all control characters but not the quote or the backslash, as `[^"]` does, is written as JSON
    with these two nevertheless (llguidance 1.9). NUL is taken out of every class: then it is not.
    """
    if decimal := _DECIMAL.fullmatch(pattern):
        digits = rf"\d{{0,{decimal[1]}}}0*" if decimal[1] else r"\d*"
        behind = rf"(?:\d{{1,{decimal[1]}}}0*|0+)" if decimal[1] else r"\d+"
        pattern = rf"^[+-]?(?:\d+\.?{digits}|\.{behind})$"
    return _Reader(pattern).read()


class _Reader:
    def __init__(self, pattern: str):
        self._pattern, self._place = pattern, 0
        self._open: list[int] = []  # where groups begin that have not ended
        self._before = ""  # "": nothing that can be repeated; else "atom" or "repetition"
        self._dot = "." if re.search(r"\(\?[a-zA-Z]*s", pattern) else _DOT

    def read(self) -> str:
        written = []
        while self._place < len(self._pattern):
            written.append(self._next())
        if self._open:
            raise self._error(self._open[-1], "the group does not end")
        return "".join(written)

    def _next(self) -> str:
        """One part, written for the crate."""
        begin = self._place
        first = self._pattern[begin]
        count = _COUNT.match(self._pattern, begin)
        if first in "*+?" or count:
            return self._repetition(begin, count)
        if first == "(":
            return self._group(begin)
        if first == ")":
            if not self._open:
                raise self._error(begin, r"no group ends here; a bracket is written \)")
            self._open.pop()
        self._before = "" if first in "|^$" else "atom"
        if first == "[":
            return self._class()
        if first == "\\":
            return self._escape()
        self._place += 1
        return self._dot if first == "." else f"\\{first}" if first in "{}]" else first

    def _repetition(self, begin: int, count: re.Match[str] | None) -> str:
        if self._before == "repetition":
            raise self._error(begin, "a repetition cannot be repeated; put it in a group, or escape it")
        if not self._before:
            raise self._error(begin, "there is nothing to repeat; escape it if it stands for itself")
        if count:
            least, _, most = count[0][1:-1].partition(",")
            if max(len(least), len(most)) > _MAX_COUNT_DIGITS:
                raise self._error(begin, "the count is too large")
            if most and int(least) > int(most):
                raise self._error(begin, "the least count is above the most")
        end = begin + len(count[0]) if count else begin + 1
        self._place = end + self._pattern.startswith("?", end)
        self._before = "repetition"
        return self._pattern[begin:self._place]

    def _group(self, begin: int) -> str:
        if self._pattern.startswith(_LOOK_AROUND, begin):
            raise self._error(begin, "look-around is not supported; say it with allOf, or with another pattern")
        found = _GROUP.match(self._pattern, begin)
        assert found is not None, "a bracket is enough"
        if found[0] == "(" and self._pattern.startswith("?", found.end()):
            raise self._error(begin, "no group begins like this")
        self._before, self._place = "", found.end()
        if "x" in (found["flags"] or "").partition("-")[0]:  # blanks and comments: the crate reads the rest by itself
            self._place = len(self._pattern)
            return self._pattern[begin:]
        if found["end"] != ")":
            self._open.append(begin)
        return found[0]

    def _escape(self) -> str:
        """Outside of a class."""
        begin = self._place
        name = self._pattern[begin + 1:begin + 2]
        if name in ("b", "B"):
            raise self._error(begin, "a word's boundary is look-around, which is not supported")
        if name in ("A", "z"):
            self._before, self._place = "", begin + 2
            return f"\\{name}"
        value = self._escaped()
        return value if len(value) > 1 and value[0] == "[" else _plain(value)

    def _escaped(self) -> str:
        """The character that an escape stands for, or the class in brackets, NUL taken out."""
        begin = self._place
        name = self._pattern[begin + 1:begin + 2]
        self._place = begin + 2
        if name in _SETS:
            return _SETS[name] if name.islower() else f"[{_SETS[name]}--\\x00]"
        if name in ("p", "P") and (found := _PROPERTY.match(self._pattern, begin)):
            self._place = found.end()
            return f"[{found[0]}--\\x00]"
        if name in ("x", "u") and (found := _CODE.match(self._pattern, begin)):
            self._place = found.end()
            return self._code(begin, found)
        if name in _CONTROLS:
            return _CONTROLS[name]
        if name == "c":
            letter = self._pattern[begin + 2:begin + 3]
            if letter.isascii() and letter.isalpha():
                self._place = begin + 3
                return chr(ord(letter) % 32)
            self._place = begin + 1  # Annex B: the backslash stands for itself
            return "\\"
        after = self._pattern[begin + 2:begin + 3]
        if name == "0" and not (after.isascii() and after.isdigit()):
            return "\0"
        if name.isascii() and name.isdigit():
            raise self._error(begin, "back-references and octal escapes are not supported")
        if not name or (name.isascii() and name.isalpha()):
            raise self._error(begin, rf"it is no escape; a backslash is written \\{'' if name else ' '}".rstrip())
        return name

    def _code(self, begin: int, found: re.Match[str]) -> str:
        short, braced, high, low, four = found.groups()
        code = int(short or braced or four or "0", 16)
        if high:
            code = 0x10000 + ((int(high, 16) - 0xD800) << 10) + int(low, 16) - 0xDC00
        if code > _MAX_CODE or 0xD800 <= code < 0xE000:
            raise self._error(begin, "there is no character of this number")
        return chr(code)

    def _class(self) -> str:
        begin = self._place
        is_negated = self._pattern.startswith("[^", begin)
        self._place += 2 if is_negated else 1
        members, may_hold_nul = [], is_negated
        while not self._pattern.startswith("]", self._place):
            place = self._place
            first, last = self._member(begin), ""
            if self._pattern.startswith("-", self._place) and not self._pattern.startswith("]", self._place + 1):
                self._place += 1
                last = self._member(begin)
            if len(first) == 1 and len(last) == 1:
                if first > last:
                    raise self._error(place, "the range's end comes before its beginning")
                members.append(f"{_member(first)}-{_member(last)}")
            else:  # Annex B: where a class stands at an end, the hyphen stands for itself
                members += [_member(first), r"\-", _member(last)] if last else [_member(first)]
            may_hold_nul |= first == "\0" or "--" in first + last or last == "\0"
        self._place += 1
        if not members:
            return _ANY if is_negated else _NONE
        written = f"[{'^' if is_negated else ''}{''.join(members)}]"
        return f"[{written}--\\x00]" if may_hold_nul else written

    def _member(self, begin: int) -> str:
        """A character, or a class in brackets. begin: of the class around it."""
        if self._place >= len(self._pattern):
            raise self._error(begin, r"the class does not end; a bracket is written \[")
        if self._pattern[self._place] != "\\":
            self._place += 1
            return self._pattern[self._place - 1]
        name = self._pattern[self._place + 1:self._place + 2]
        if name == "b":
            self._place += 2
            return "\b"
        return self._escaped()

    def _error(self, place: int, reason: str) -> RegexError:
        return mistake(self._pattern, place, reason)


def _member(value: str) -> str:
    return value if len(value) > 1 else _plain(value)


def _plain(char: str) -> str:
    """The character as it stands for itself, within a class and outside."""
    return char if char.isalnum() else f"\\x{{{ord(char):x}}}"
