"""Translates a body of the Messages API into a chat request."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from serving.api.effort import read_variables, thinking_switches
from serving.api.errors import invalid
from serving.api.members import check_members, check_values
from serving.api.state import ServerState
from serving.api.types import ChatBody, CountTokensBody, MessagesBody, parse

TOOL_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
# A chat's paths by the names that they have here, for errors.
NAMES = {"stop": "stop_sequences", r"response_format\.json_schema": "output_config.format",
         "response_format": "output_config.format", r"tools\.(\d+)\.function\.parameters": r"tools.\1.input_schema",
         r"tools\.(\d+)\.function": r"tools.\1"}
# The members of each type of content. A signature seals thinking that is not shown in clear; here it is.
BLOCKS = {
    "text": ("type", "text", "cache_control", "citations"),
    "thinking": ("type", "thinking", "signature"),
    "redacted_thinking": ("type", "data"),
    "tool_use": ("type", "id", "name", "input", "cache_control", "caller", "toolset_name"),
    "tool_result": ("type", "tool_use_id", "content", "is_error", "cache_control", "toolset_name"),
}
NOT_BUILT: dict[str, tuple[Any, ...]] = {"citations": ([],), "caller": ({"type": "direct"},), "toolset_name": ()}
TOOL_MEMBERS = ("type", "name", "description", "input_schema", "strict", "cache_control", "eager_input_streaming",
                "allowed_callers", "defer_loading", "input_examples")
TOOLS_NOT_BUILT: dict[str, tuple[Any, ...]] = {
    "allowed_callers": (["direct"],), "defer_loading": (False,), "input_examples": ([],)}


@dataclass
class Chat:
    """messages: as a chat has them. places: the path in the request that each came from."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    places: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, body: CountTokensBody) -> Chat:
        """The conversation. Raises ApiError."""
        made = cls()
        if body.system:
            made._add("system", {"role": "system", "content": _text_of(body.system, "system")})
        for index, message in enumerate(body.messages):
            made._add_message(f"messages.{index}", message.role, message.content)
        _clear_thinking(made.messages, body)
        return made

    def _add(self, place: str, message: dict[str, Any]) -> None:
        self.messages.append(message)
        self.places.append(place)

    def _add_message(self, place: str, role: str, content: str | list[dict[str, Any]]) -> None:
        """A message may stand for several: results of tools are messages of their own."""
        if role == "system" or isinstance(content, str):
            self._add(place, {"role": role, "content": _text_of(content, f"{place}.content")})
            return
        texts, calls, reasoning, num_results = [], [], [], 0
        for index, block in enumerate(content):
            where, kind = f"{place}.content.{index}", block.get("type")
            if kind != "text" and (kind not in BLOCKS or (role == "user") != (kind == "tool_result")):
                raise invalid(f"{where}: content of type {str(kind)[:64]!r} is not supported here; of a {role} only "
                              f"text and {'tool_result' if role == 'user' else 'thinking and tool_use'}", "messages")
            _check_block(block, where)
            if kind == "text":
                texts.append(_string(block, "text", where))
            elif kind == "thinking":
                reasoning.append(_string(block, "thinking", where))
            elif kind == "tool_use":
                calls.append(_call(block, where))
            elif kind == "tool_result":
                self._add(where, _result(block, where))
                num_results += 1
        if role == "assistant":
            self._add(place, {"role": role, "content": "".join(texts), **({"tool_calls": calls} if calls else {}),
                              **({"reasoning_content": "".join(reasoning)} if reasoning else {})})
        elif texts or not num_results:
            self._add(place, {"role": role, "content": _joined(texts)})


def _check_block(block: dict[str, Any], where: str) -> None:
    check_members(block, BLOCKS[block["type"]], where)
    check_values(block, NOT_BUILT, where)
    check_cache_control(block, where)


def check_cache_control(block: dict[str, Any], where: str) -> None:
    """Every prefix is cached here as long as there is room: the mark asks for nothing. Raises ApiError."""
    if (mark := block.get("cache_control")) is not None:
        if not isinstance(mark, dict):
            raise invalid(f"{where}.cache_control must be an object", where.partition(".")[0])
        check_members(mark, ("type", "ttl", "scope"), f"{where}.cache_control")
        check_values(mark, {"type": ("ephemeral",), "ttl": ("5m", "1h")}, f"{where}.cache_control")


def _string(block: dict[str, Any], name: str, where: str) -> str:
    if not isinstance(text := block.get(name), str):
        raise invalid(f"{where}.{name} must be a string", where.partition(".")[0])
    return text


def _call(block: dict[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(given := block.get("input", {}), dict):
        raise invalid(f"{where}.input must be an object", "messages")
    return {"id": str(block.get("id", "")), "type": "function", "function": {
        "name": _string(block, "name", where), "arguments": json.dumps(given, ensure_ascii=False)}}


def _result(block: dict[str, Any], where: str) -> dict[str, Any]:
    """Templates have no word for a call that failed: its result says so."""
    if not isinstance(failed := block.get("is_error") or False, bool):
        raise invalid(f"{where}.is_error must be true or false", "messages")
    content = _text_of(block.get("content") or "", f"{where}.content")
    text = content if isinstance(content, str) else "".join(part["text"] for part in content)
    return {"role": "tool", "tool_call_id": str(block.get("tool_use_id", "")),
            "content": f"Error: {text}" if failed else text}


def _text_of(content: Any, where: str) -> str | list[dict[str, str]]:
    if isinstance(content, str):
        return content
    texts = []
    for index, part in enumerate(content if isinstance(content, list) else [content]):
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else part
            raise invalid(f"{where}.{index}: only text is supported here, got {str(kind)[:64]!r}",
                          where.partition(".")[0])
        _check_block(part, f"{where}.{index}")
        texts.append(_string(part, "text", f"{where}.{index}"))
    return _joined(texts)


def _joined(texts: list[str]) -> str | list[dict[str, str]]:
    """Several texts stay apart, for the template to join as it does."""
    return [{"type": "text", "text": text} for text in texts] if len(texts) > 1 else "".join(texts)


def _clear_thinking(messages: list[dict[str, Any]], body: CountTokensBody) -> None:
    """What `context_management` asks for: only the latest turns keep their thinking. Raises ApiError."""
    edits = body.context_management.edits if body.context_management else None
    for index, edit in enumerate(edits or ()):
        where = f"context_management.edits.{index}"
        if edit.get("type") != "clear_thinking_20251015":
            raise invalid(f"{where}: edits of type {str(edit.get('type'))[:64]!r} are not supported; only "
                          "clear_thinking_20251015", "context_management")
        check_members(edit, ("type", "keep"), where)
        keep = edit.get("keep") or {"type": "thinking_turns", "value": 1}
        if keep in ("all", {"type": "all"}):
            continue
        if not isinstance(keep, dict) or keep.get("type") != "thinking_turns" or type(keep.get("value")) is not int:
            raise invalid(f'{where}.keep must be "all" or {{"type": "thinking_turns", "value": ...}}',
                          "context_management")
        check_members(keep, ("type", "value"), f"{where}.keep")
        if keep["value"] < 1:
            raise invalid(f"{where}.keep.value must be at least 1", "context_management")
        thinking = [message for message in messages if "reasoning_content" in message]
        for message in thinking[: -keep["value"]]:
            del message["reasoning_content"]


def chat_body(state: ServerState, body: MessagesBody | CountTokensBody, chat: Chat) -> ChatBody:
    """The chat request that means the same. Raises ApiError."""
    choice = body.tool_choice
    fields: dict[str, Any] = {
        "messages": chat.messages, "model": body.model, "tools": _tools(body.tools),
        "tool_choice": _tool_choice(body),
        "parallel_tool_calls": not (choice and choice.disable_parallel_tool_use),
        "response_format": _response_format(body),
        "chat_template_kwargs": _variables(state, body) or None}
    if isinstance(body, MessagesBody):
        fields |= {"max_tokens": body.max_tokens, "temperature": body.temperature, "top_p": body.top_p,
                   "top_k": body.top_k, "stop": body.stop_sequences or None, "stream": body.stream}
    return parse({name: value for name, value in fields.items() if value is not None}, ChatBody)


def _variables(state: ServerState, body: CountTokensBody) -> dict[str, Any]:
    """How much the model shall think. These are hints to Anthropic's models too, and clients send them to every model:
    a template that has no variable for them has one way to think."""
    if body.thinking is None and body.output_config is None:
        return {}
    known = read_variables(state)
    found: dict[str, Any] = {}
    if body.thinking is not None:
        found = thinking_switches(known, body.thinking.type != "disabled")
    effort = body.output_config and body.output_config.effort
    if effort and "reasoning_effort" in known and not (body.thinking and body.thinking.type == "disabled"):
        found["reasoning_effort"] = effort
    return found


def hides_thinking(body: MessagesBody) -> bool:
    """Whether thinking is left out of the answer: it is to be omitted, or was turned off, and the model may think all
    the same."""
    return body.thinking is not None and (body.thinking.display == "omitted" or body.thinking.type == "disabled")


def _tools(tools: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
    if not tools:
        return None
    made = []
    for index, tool in enumerate(tools):
        where = f"tools.{index}"
        if tool.get("type") not in ("custom", None):
            raise invalid(f"{where}.type: tools of type {str(tool['type'])[:64]!r} are not supported; only custom, the "
                          "client's own", "tools")
        if not isinstance(tool.get("input_schema") or {}, dict):
            raise invalid(f"{where}.input_schema must be a JSON schema, an object", "tools")
        check_members(tool, TOOL_MEMBERS, where)
        check_values(tool, TOOLS_NOT_BUILT, where)
        check_cache_control(tool, where)
        made.append({"type": "function", "function": {
            "name": tool.get("name"), "description": tool.get("description") or "",
            "parameters": tool.get("input_schema") or {},
            **({"strict": tool["strict"]} if tool.get("strict") else {})}})
    return made


def _tool_choice(body: CountTokensBody) -> str | dict[str, Any] | None:
    choice = body.tool_choice
    if choice is None:
        return None
    if choice.type != "tool":
        if choice.name is not None:
            raise invalid(f"tool_choice.name is for type tool, and this is {choice.type}", "tool_choice")
        return TOOL_CHOICES[choice.type]
    if choice.name is None:
        raise invalid("tool_choice of type tool needs a name", "tool_choice")
    return {"type": "function", "function": {"name": choice.name}}


def _response_format(body: CountTokensBody) -> dict[str, Any] | None:
    form = body.output_config and body.output_config.format
    if not form:
        return None
    check_members(form, ("type", "schema"), "output_config.format")
    if form.get("type") != "json_schema" or not isinstance(form.get("schema"), dict):
        raise invalid('output_config.format must be {"type": "json_schema", "schema": {...}}', "output_config")
    return {"type": "json_schema", "json_schema": {"name": "output", "schema": form["schema"]}}
