"""Parsers by name. A parser's module is imported when the parser is asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from xllm.errors import ConfigError

if TYPE_CHECKING:
    from serving.parsers.reasoning.think_parser import ThinkParser
    from serving.parsers.tools.tool_parser import ToolParser

TOOL_PARSERS = {
    "hermes": "hermes:HermesParser",
    "qwen3_coder": "qwen3_coder:Qwen3CoderParser",
    "llama3_json": "llama3_json:Llama3JsonParser",
    "pythonic": "pythonic:PythonicParser",
    "mistral": "mistral:MistralParser",
    "deepseek_v3": "deepseek:DeepSeekV3Parser",
    "deepseek_v31": "deepseek:DeepSeekV31Parser",
    "kimi_k2": "kimi_k2:KimiK2Parser",
    "glm45": "glm45:Glm45Parser",
}
REASONING_PARSERS = {
    "deepseek_r1": "think_families:DeepSeekR1ThinkParser",
    "qwen3": "think_families:Qwen3ThinkParser",
    "glm45": "think_families:Glm45ThinkParser",
    "kimi_k2": "think_families:KimiK2ThinkParser",
}
# Names under which vLLM and SGLang know the same formats.
TOOL_ALIASES = {
    "qwen": "hermes", "qwen25": "hermes", "qwen3": "hermes", "qwen3_xml": "qwen3_coder", "llama3": "llama3_json",
    "llama4_json": "llama3_json", "llama4_pythonic": "pythonic", "deepseekv3": "deepseek_v3",
    "deepseekv31": "deepseek_v31", "glm": "glm45", "glm47": "glm45",
}
REASONING_ALIASES = {
    "deepseek-r1": "deepseek_r1", "deepseek_v3": "qwen3", "deepseek-v3": "qwen3", "deepseek_v31": "qwen3",
    "qwen3-thinking": "deepseek_r1", "glm47": "glm45", "kimi": "kimi_k2",
}
AUTO, NONE = "auto", "none"


def tool_parser(name: str) -> type[ToolParser]:
    """The class by its name. Raises ConfigError listing the names."""
    found: type[ToolParser] = _load("tools", _known("tool_call_parser", name, TOOL_PARSERS, TOOL_ALIASES), TOOL_PARSERS)
    return found


def reasoning_parser(name: str) -> type[ThinkParser]:
    """The class by its name. Raises ConfigError listing the names."""
    known = _known("reasoning_parser", name, REASONING_PARSERS, REASONING_ALIASES)
    found: type[ThinkParser] = _load("reasoning", known, REASONING_PARSERS)
    return found


def check_names(tools: str, reasoning: str) -> None:
    """Raise ConfigError unless both are names of parsers, "auto" or "none"."""
    if tools not in (AUTO, NONE):
        _known("tool_call_parser", tools, TOOL_PARSERS, TOOL_ALIASES)
    if reasoning not in (AUTO, NONE):
        _known("reasoning_parser", reasoning, REASONING_PARSERS, REASONING_ALIASES)


def guess_tool_parser(template: str) -> str | None:
    """The format that a chat template teaches its model; None where it is not certain."""
    if "<function=" in template and "<parameter=" in template:
        return "qwen3_coder"
    if "<arg_key>" in template and "<tool_call>" in template:
        return "glm45"
    if "<|tool_calls_section_begin|>" in template:
        return "kimi_k2"
    if "<｜tool▁sep｜>" in template:
        return "deepseek_v3" if "```json" in template else "deepseek_v31"
    if "[TOOL_CALLS]" in template:
        return "mistral"
    if "<tool_call>" in template and "arguments" in template:
        return "hermes"
    if "<|python_start|>" in template:
        return "pythonic"
    if "<|python_tag|>" in template or ('"parameters": dictionary of argument name' in template):
        return "llama3_json"
    return None


def guess_reasoning_parser(template: str) -> str | None:
    """The family of the model that a chat template was written for; None where it does not think."""
    if "</think>" not in template:
        return None
    if "<|tool_calls_section_begin|>" in template:
        return "kimi_k2"
    if "<arg_key>" in template:
        return "glm45"
    if "<｜Assistant｜>" in template:  # V3.1 asks for `thinking`, R1 always thinks
        return "qwen3" if "thinking" in template else "deepseek_r1"
    return "qwen3" if "<|im_start|>" in template else None


def _known(setting: str, name: str, parsers: dict[str, str], aliases: dict[str, str]) -> str:
    name = aliases.get(name, name)
    if name not in parsers:
        names = ", ".join([AUTO, NONE, *parsers])
        raise ConfigError(f"{setting}: there is no parser {name!r}; choose one of {names}")
    return name


def _load(folder: str, name: str, parsers: dict[str, str]):  # type: ignore[no-untyped-def]
    module, _, kind = parsers[name].partition(":")
    return getattr(importlib.import_module(f"serving.parsers.{folder}.{module}"), kind)
