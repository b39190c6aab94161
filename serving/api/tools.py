"""Reads what a chat request says about tools, and makes the parser of its output or the form that it must have."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from serving.api.errors import invalid
from serving.api.members import check_members
from serving.api.types import ChatBody
from serving.parsers.output import AnswerParser
from serving.parsers.tool_set import ToolSet
from serving.parsers.tools.forced import NamedParser, RequiredParser
from serving.parsers.tools.tool_parser import ToolParser

_NAME = re.compile(r"[\w.\-:/]{1,128}")
_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True)
class ToolWish:
    """The tools of one request.

    tools: as the client sent them, for the template; empty with `tool_choice` "none", which hides them.
    choice: "none", "auto", "required", or "named" with `name`.
    """

    tools: Sequence[Mapping[str, Any]] = ()
    choice: str = "none"
    name: str | None = None
    parallel: bool = True

    @property
    def is_forced(self) -> bool:
        """Whether the output must be a call."""
        return self.choice in ("required", "named")

    @property
    def functions(self) -> list[Mapping[str, Any]]:
        """The functions of the tools, as `ToolSet` takes them."""
        return [tool["function"] for tool in self.tools]

    def form(self, model_parser: type[ToolParser] | None, hidden: frozenset[str]) -> dict[str, Any] | None:
        """What the output must be like, as the fields of a `StructuredOutput`; None: free.

        Forced calls are JSON and nothing else. Of calls that the model may make, those to `strict` functions follow
        their schemas, where the format can say so. hidden: texts that are special tokens, which no form can hold.
        """
        if self.choice == "named":
            return {"json": _parameters(next(f for f in self.functions if f["name"] == self.name))}
        if self.choice == "required":
            return {"json": self._list_schema()}
        if model_parser is None or model_parser.trigger is None or hidden.intersection(model_parser.markers):
            return None
        if self.choice == "none" or not any(function.get("strict") for function in self.functions):
            return None
        structures = []
        for function in self.functions:
            begin, end = model_parser.frame(function["name"])
            schema = _parameters(function) if function.get("strict") else {"type": "object"}
            structures.append({"begin": begin, "schema": schema, "end": end})
        return {"structural_tag": {"structures": structures, "triggers": [model_parser.trigger]}}

    def _list_schema(self) -> dict[str, Any]:
        calls = [_call_schema(function, f"#/items/anyOf/{index}/properties/parameters")
                 for index, function in enumerate(self.functions)]
        schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
        return schema if self.parallel else {**schema, "maxItems": 1}

    def answer_parser(self, model_parser: type[ToolParser] | None) -> AnswerParser | None:
        """A fresh parser for one choice. Raises ApiError if the server cannot read this model's calls."""
        tools = ToolSet(self.functions)
        if self.choice == "named":
            assert self.name is not None
            return NamedParser(tools, self.name)
        if self.choice == "required":
            return RequiredParser(tools)
        if self.choice == "none":
            return None
        if model_parser is None:
            raise invalid("tools: this server does not know the format of the model's tool calls; it needs "
                          '--tool-call-parser, or a request with tool_choice "required" or "none"', "tools")
        return model_parser(tools)


def chat_tools(body: ChatBody, model_parser: type[ToolParser] | None) -> ToolWish:
    """The checked wish of a chat. Raises ApiError naming the field, also where the model may call tools and the server
    cannot read its calls."""
    wish = read_tools(body.tools, body.tool_choice, body.parallel_tool_calls)
    if wish.choice == "auto":
        wish.answer_parser(model_parser)
    return wish


def read_tools(tools: list[dict[str, Any]] | None, choice: str | dict[str, Any] | None,
               parallel: bool | None) -> ToolWish:
    """The checked wish. Raises ApiError naming the field."""
    names = [_checked_name(index, tool) for index, tool in enumerate(tools or ())]
    if len(set(names)) < len(names):
        raise invalid("tools: two functions have the same name", "tools")
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        tools, choice = _allowed(tools or [], choice)
    kind, name = _read_choice(choice, has_tools=bool(names))
    if kind in ("required", "named") and not names:
        raise invalid("tool_choice needs tools", "tool_choice")
    if name is not None and name not in names:
        raise invalid(f"tool_choice: there is no tool {name[:64]!r}", "tool_choice")
    return ToolWish(tools or () if kind != "none" else (), kind if names else "none", name, parallel is not False)


def _read_choice(choice: str | dict[str, Any] | None, *, has_tools: bool) -> tuple[str, str | None]:
    if choice is None:
        return ("auto" if has_tools else "none"), None
    if isinstance(choice, str):
        if choice not in ("none", "auto", "required"):
            raise invalid(f'tool_choice must be "none", "auto", "required" or a named function, got {choice[:64]!r}',
                          "tool_choice")
        return choice, None
    check_members(choice, ("type", "function"), "tool_choice")
    return "named", _named_function(choice, "tool_choice")


def _named_function(wish: Any, where: str) -> str:
    """The name in {"type": "function", "function": {"name"}}. Raises ApiError."""
    function = wish.get("function") if isinstance(wish, dict) and wish.get("type") == "function" else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise invalid(f'{where} must be a string or {{"type": "function", "function": {{"name": ...}}}}', "tool_choice")
    check_members(function, ("name",), f"{where}.function")
    name: str = function["name"]
    return name


def _allowed(tools: list[dict[str, Any]], choice: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """The tools that `allowed_tools` names, and its mode: the model does not see the others. Raises ApiError."""
    where = "tool_choice.allowed_tools"
    wish = choice.get("allowed_tools")
    if not isinstance(wish, dict) or wish.get("mode") not in ("auto", "required") or not isinstance(
            wish.get("tools"), list) or not wish["tools"]:
        raise invalid(f'{where} must be {{"mode": "auto" or "required", "tools": [...]}}', "tool_choice")
    check_members(choice, ("type", "allowed_tools"), "tool_choice")
    check_members(wish, ("mode", "tools"), where)
    names = [_named_function(tool, f"{where}.tools.{index}") for index, tool in enumerate(wish["tools"])]
    if unknown := set(names) - {tool["function"]["name"] for tool in tools}:
        raise invalid(f"{where}: there is no tool {min(unknown)[:64]!r}", "tool_choice")
    return [tool for tool in tools if tool["function"]["name"] in names], wish["mode"]


def _checked_name(index: int, tool: dict[str, Any]) -> str:
    where = f"tools.{index}"
    if tool.get("type", "function") != "function":
        raise invalid(f"{where}: tools of type {str(tool['type'])[:64]!r} are not supported; only function", "tools")
    check_members(tool, ("type", "function", "cache_control"), where)
    function = tool.get("function")
    if not isinstance(function, dict):
        raise invalid(f"{where}.function must be an object", "tools")
    check_members(function, ("name", "description", "parameters", "strict", "return"), f"{where}.function")
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise invalid(f"{where}.function.name must be 1 to 128 letters, digits, '_', '-', '.', ':' or '/'", "tools")
    if not isinstance(function.get("parameters") or {}, dict):
        raise invalid(f"{where}.function.parameters must be a JSON schema object", "tools")
    if not isinstance(function.get("strict") or False, bool):
        raise invalid(f"{where}.function.strict must be true or false", "tools")
    if not isinstance(function.get("description") or "", str):
        raise invalid(f"{where}.function.description must be a string", "tools")
    return name


def _parameters(function: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a function's arguments, which are an object whatever else they are."""
    schema: dict[str, Any] = function.get("parameters") or _NO_PARAMETERS
    return schema if "type" in schema else {"type": "object", **schema}


def _call_schema(function: Mapping[str, Any], pointer: str) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "required": ["name", "parameters"],
            "properties": {"name": {"type": "string", "enum": [function["name"]]},
                           "parameters": _moved(_parameters(function), pointer, 0)}}


def _moved(schema: Any, pointer: str, depth: int) -> Any:
    """The schema with its local references (`#/...`) pointing to where it will stand in a larger one."""
    if depth > 64:
        raise invalid("tools: parameters are nested too deep", "tools")
    if isinstance(schema, list):
        return [_moved(item, pointer, depth + 1) for item in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _moved(value, pointer, depth + 1) for key, value in schema.items()}
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = pointer + reference[1:]
    return moved
