"""`MarkupParser`: arguments as pairs of a key and a bare value between tags, as GLM-4.5 and Qwen3-Coder write them.

The schema of the tool says which values are strings; those are streamed, the others converted when complete.
"""

from __future__ import annotations

import json
from typing import ClassVar

from serving.parsers.source import Markers, Steps, UnreadableError
from serving.parsers.tools.base import ToolParser


class MarkupParser(ToolParser):
    """parts: what begins a pair, then what may end the arguments. value_end: what ends a value."""

    parts: ClassVar[Markers]
    value_end: ClassVar[Markers]

    def key(self) -> Steps[str]:
        """Read a pair from its beginning to its value; `source.commit` as soon as it stands. Raises UnreadableError:
        then what the source holds is content."""
        raise NotImplementedError

    def pairs(self, function: str) -> Steps[str | None]:
        """All arguments of a call, up to what ends them, which is returned and not read; None: the text ended."""
        self.arguments("{")
        before = ""
        while True:
            yield from self.source.space()
            part = yield from self.source.until(self.parts, self.content)
            if part != self.parts.texts[0]:
                break
            self.source.hold()
            try:
                key = yield from self.key()
            except UnreadableError:
                self.content(self.source.release())
                continue
            self.arguments(f"{before}{json.dumps(key, ensure_ascii=False)}: ")
            before = ", "
            if not (yield from self._value(function, key)):
                return None  # cut off: what came is passed on, unclosed
        if part is not None:
            self.arguments("}")
        return part

    def _value(self, function: str, key: str) -> Steps[bool]:
        """One value; False: the text ended within it."""
        if self.tools.is_text(function, key):
            self.arguments('"')
            end = yield from self.source.until(self.value_end, self.arguments_text)
            if end is not None:
                self.arguments('"')
        else:
            parts: list[str] = []
            end = yield from self.source.until(self.value_end, parts.append)
            if end is not None:
                self.arguments(self.tools.as_json(function, key, "".join(parts)))
            else:
                self.arguments_text("".join(parts))
        if end is not None:
            yield from self.source.require(end)
        return end is not None
