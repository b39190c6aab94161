"""The families of models that think between `<think>` and `</think>`, and their differences."""

from __future__ import annotations

from serving.parsers.reasoning.think_parser import ThinkParser


class DeepSeekR1ThinkParser(ThinkParser):
    """Thinks from the first token on unless the prompt has closed the tag; older templates do not open it."""

    thinks_at_once = True


class Qwen3ThinkParser(ThinkParser):
    """Qwen 3 and DeepSeek V3.1: thinks if the output, or the prompt, opens the tag."""


class Glm45ThinkParser(ThinkParser):
    """GLM-4.5 to 4.7."""


class KimiK2ThinkParser(ThinkParser):
    """Kimi K2 Thinking: a call may end the thinking without a closing tag."""

    also_ends = ("<|tool_calls_section_begin|>",)
