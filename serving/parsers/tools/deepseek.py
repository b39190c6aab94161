"""DeepSeek V3, R1-0528 and V3.1: calls between markers, one section of them at the end of the answer.

    <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{"city": "Paris"}<｜tool▁call▁end｜><｜tool▁calls▁end｜>
"""

from __future__ import annotations

from serving.parsers.source import Markers, ParserSteps
from serving.parsers.tools.tool_parser import ToolParser

SECTION, SECTION_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
SEPARATOR = "<｜tool▁sep｜>"


class DeepSeekV31Parser(ToolParser):
    """DeepSeek V3.1: the name, the separator and bare JSON, as in the sample above."""

    opening = Markers(SECTION)
    endings = (SECTION_END, CALL_END)
    markers = (SECTION, SECTION_END, CALL, CALL_END, SEPARATOR)
    trigger = CALL
    _next = Markers(CALL, SECTION_END)
    _closing = Markers(CALL_END, CALL, SECTION_END)

    @classmethod
    def frame(cls, name: str) -> tuple[str, str]:
        return f"{CALL}{name}{SEPARATOR}", CALL_END

    def read_calls(self, marker: str) -> ParserSteps[None]:
        while True:
            yield from self.source.space()
            if not (yield from self.source.expect(CALL)):
                break
            yield from self.read_call()
            yield from self.after_call(self._closing)
            self.source.hold()
        if self.num_calls and (yield from self.source.expect(SECTION_END)):
            self.source.commit()

    def read_call(self) -> ParserSteps[None]:
        name = yield from self.source.name()
        yield from self.source.require(SEPARATOR)
        self.begin_call(name)
        yield from self.source.space()
        if (yield from self.source.peek()) in ("", "<"):
            self.arguments("{}")
        else:
            yield from self.stream_arguments(self._closing)


class DeepSeekV3Parser(DeepSeekV31Parser):
    """DeepSeek V3 and R1-0528: the kind of tool before the name, the JSON in a fenced block.

            <｜tool▁call▁begin｜>function<｜tool▁sep｜>f
            ```json
            {"city": "Paris"}
            ```<｜tool▁call▁end｜>
    """

    _fence_end = Markers("\n```" + CALL_END, "```" + CALL_END, CALL_END, CALL, SECTION_END)

    @classmethod
    def frame(cls, name: str) -> tuple[str, str]:
        return f"{CALL}function{SEPARATOR}{name}\n```json\n", "\n```" + CALL_END

    def read_call(self) -> ParserSteps[None]:
        source = self.source
        yield from source.require("function")
        yield from source.require(SEPARATOR)
        name = yield from source.name()
        yield from source.space()
        yield from source.require("```json")
        self.begin_call(name)
        yield from source.space()
        yield from self.stream_arguments(self._fence_end)
        yield from source.space()
        yield from source.expect("```")
