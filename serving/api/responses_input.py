"""Translates a body of the Responses API into a chat request."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from serving.api.errors import invalid
from serving.api.members import check_members, check_values
from serving.api.types import PASSED_ON, ChatBody, ResponsesBody, parse

SAMPLING = tuple(name for name in PASSED_ON if name in ResponsesBody.model_fields)  # called alike here and in a chat
LOGPROBS = "message.output_text.logprobs"
# A chat's paths by the names that they have here, for errors.
NAMES = {"messages": "input", "max_tokens": "max_output_tokens", r"response_format\.json_schema": "text.format",
         "response_format": "text.format", "reasoning_effort": "reasoning.effort", "verbosity": "text.verbosity",
         r"tools\.(\d+)\.function": r"tools.\1", r"tool_choice\.allowed_tools": "tool_choice"}

# The members of each type of item and part. Ids, states and phases are marks of an item's writer, and annotations
# and logprobs remarks on a text: neither says anything that a template could show to the model.
MARKS = ("type", "id", "status")
ITEMS = {
    "message": (*MARKS, "role", "content", "phase"),
    "function_call": (*MARKS, "call_id", "name", "arguments", "caller", "namespace"),
    "function_call_output": (*MARKS, "call_id", "output", "caller", "name", "namespace"),
    "reasoning": (*MARKS, "summary", "content", "encrypted_content"),
}
PARTS = {
    "input_text": ("type", "text", "prompt_cache_breakpoint"), "text": ("type", "text"),
    "output_text": ("type", "text", "annotations", "logprobs"),
}
NOT_BUILT: dict[str, tuple[Any, ...]] = {"caller": ({"type": "direct"},), "namespace": (), "encrypted_content": ("",)}
TOOL_MEMBERS = ("type", "name", "description", "parameters", "strict", "allowed_callers", "defer_loading")
TOOLS_NOT_BUILT: dict[str, tuple[Any, ...]] = {"allowed_callers": (["direct"],), "defer_loading": (False,)}


@dataclass
class ChatConversation:
    """messages: as a chat has them. places: the path in the request that each came from."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    _reasoning: str = ""

    @classmethod
    def of(cls, body: ResponsesBody, before: list[dict[str, Any]]) -> ChatConversation:
        """The messages of a request, behind those of the response that it continues. Raises ApiError."""
        made = cls()
        for message in before:
            made._add("previous_response_id", message)
        if isinstance(body.input, str):
            made._add("input", {"role": "user", "content": body.input})
            return made
        for index, item in enumerate(body.input):
            made._add_item(f"input.{index}", item)
        made._flush("input")
        return made

    def places_after(self, body: ResponsesBody) -> list[str]:
        """The places with that of the instructions, which are for one request and not part of the conversation."""
        return ["instructions", *self.places] if body.instructions else self.places

    def _add(self, place: str, message: dict[str, Any]) -> None:
        self.messages.append(message)
        self.places.append(place)

    def _add_item(self, place: str, item: dict[str, Any]) -> None:
        kind = item.get("type", "message")
        if kind not in ITEMS:
            raise invalid(f"{place}: items of type {str(kind)[:64]!r} are not supported", "input")
        check_members(item, ITEMS[kind], place)
        check_values(item, NOT_BUILT, place)
        if kind == "reasoning":
            self._reasoning += _thoughts_of(item, place)
        elif kind == "function_call":
            self._add_call(place, item)
        elif kind == "function_call_output":
            self._flush(place)
            self._add(place, {"role": "tool", "tool_call_id": str(item.get("call_id", "")),
                              "content": _text_of(item.get("output"), f"{place}.output")})
        else:
            self._add_message(place, item)

    def _add_message(self, place: str, item: dict[str, Any]) -> None:
        role = item.get("role")
        if role not in ("user", "assistant", "system", "developer"):
            raise invalid(f"{place}.role must be user, assistant, system or developer", "input")
        message = {"role": role, "content": _text_of(item.get("content"), f"{place}.content")}
        if role == "assistant":
            message |= self._take_reasoning()
        self._flush(place)
        self._add(place, message)

    def _add_call(self, place: str, item: dict[str, Any]) -> None:
        call = {"id": str(item.get("call_id", "")), "type": "function", "function": {
            "name": item.get("name"), "arguments": item.get("arguments", "")}}
        last = self.messages[-1] if self.messages else {}
        if last.get("role") == "assistant" and not self._reasoning:  # not changed: it may be a stored one
            self.messages[-1] = {**last, "tool_calls": [*last.get("tool_calls", ()), call]}
            return
        self._add(place, {"role": "assistant", "content": "", "tool_calls": [call], **self._take_reasoning()})

    def _take_reasoning(self) -> dict[str, str]:
        taken, self._reasoning = self._reasoning, ""
        return {"reasoning_content": taken} if taken else {}

    def _flush(self, place: str) -> None:
        """Thoughts that no answer followed are a turn of their own."""
        if self._reasoning:
            self._add(place, {"role": "assistant", "content": "", **self._take_reasoning()})


def _thoughts_of(item: dict[str, Any], place: str) -> str:
    """The text of a reasoning item; a summary, where it is all there is."""
    texts = []
    for name, kind in (("content", "reasoning_text"), ("summary", "summary_text")):
        parts = item.get(name) or []
        if not isinstance(parts, list) or not all(
                isinstance(part, dict) and part.keys() == {"type", "text"} and part["type"] == kind
                and isinstance(part["text"], str) for part in parts):
            raise invalid(f"{place}.{name} must be a list of {{type: {kind}, text}}", "input")
        texts.append("".join(part["text"] for part in parts))
    return texts[0] or texts[1]


def _text_of(content: Any, place: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise invalid(f"{place} must be a text or a list of parts", "input")
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in PARTS or not isinstance(part.get("text"), str):
            raise invalid(f"{place}.{index}: only text is supported, got {str(kind)[:64]!r}", "input")
        check_members(part, PARTS[kind], f"{place}.{index}")
    return "".join(part["text"] for part in content)


def chat_body(body: ResponsesBody, conversation: ChatConversation) -> ChatBody:
    """The chat request that means the same. Raises ApiError."""
    messages = conversation.messages
    if body.instructions:
        messages = [{"role": "system", "content": body.instructions}, *messages]
    tools = shown_tools(body)
    fields = {
        "model": body.model, "messages": messages, "stream": body.stream, "max_tokens": body.max_output_tokens,
        **{name: getattr(body, name) for name in SAMPLING}, **_logprobs(body),
        "tools": [{"type": "function", "function": {name: tool[name] for name in tool if name in TOOL_MEMBERS[1:5]
                                                    and tool[name] is not None}} for tool in tools] or None,
        "tool_choice": _tool_choice(body.tool_choice) if tools or body.tool_choice not in ("none", "auto") else None,
        "parallel_tool_calls": body.parallel_tool_calls, "response_format": _response_format(body.text),
        "reasoning_effort": body.reasoning and body.reasoning.effort, "verbosity": body.text and body.text.verbosity,
        "chat_template_kwargs": body.chat_template_kwargs, "priority": body.priority, "cache_salt": body.cache_salt,
        "prompt_cache_key": body.prompt_cache_key, "timeout_s": body.timeout_s,
    }
    return parse({name: value for name, value in fields.items() if value is not None}, ChatBody)


def _logprobs(body: ResponsesBody) -> dict[str, Any]:
    if LOGPROBS in (body.include or ()):
        return {"logprobs": True, "top_logprobs": body.top_logprobs}
    if body.top_logprobs:
        raise invalid(f'top_logprobs needs include: ["{LOGPROBS}"]', "top_logprobs")
    return {}


def shown_tools(body: ResponsesBody) -> list[dict[str, Any]]:
    """The functions that the model may call. Raises ApiError.

    Left out is a web search that may not reach the web: it could only find what OpenAI's service has in store. Codex
    offers it to every model.
    """
    shown = []
    for index, tool in enumerate(body.tools or ()):
        if tool.get("type") == "web_search" and tool.get("external_web_access") is False:
            continue
        if tool.get("type") != "function":
            raise invalid(f"tools.{index}: tools of type {str(tool.get('type'))[:64]!r} are not supported; only "
                          "function", "tools")
        check_members(tool, TOOL_MEMBERS, f"tools.{index}")
        check_values(tool, TOOLS_NOT_BUILT, f"tools.{index}")
        shown.append(tool)
    return shown


def _tool_choice(choice: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
    """Functions stand flat here and one level deeper in a chat."""
    if not isinstance(choice, dict):
        return choice
    if choice.get("type") == "function" and "name" in choice:
        return _function_choice(choice, "tool_choice")
    if choice.get("type") == "allowed_tools":
        check_members(choice, ("type", "mode", "tools"), "tool_choice")
        tools = choice.get("tools")
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise invalid("tool_choice.tools must be a list of tools", "tool_choice")
        return {"type": "allowed_tools", "allowed_tools": {"mode": choice.get("mode"), "tools": [
            _function_choice(tool, f"tool_choice.tools.{index}") for index, tool in enumerate(tools)]}}
    raise invalid(f"tool_choice of type {str(choice.get('type'))[:64]!r} is not supported; only function and "
                  "allowed_tools", "tool_choice")


def _function_choice(choice: dict[str, Any], where: str) -> dict[str, Any]:
    if choice.get("type") != "function":
        raise invalid(f"{where}: tools of type {str(choice.get('type'))[:64]!r} are not supported", "tool_choice")
    check_members(choice, ("type", "name"), where)
    return {"type": "function", "function": {"name": choice.get("name")}}


def _response_format(text: Any) -> dict[str, Any] | None:
    form: dict[str, Any] | None = None if text is None else text.format
    if form is None:
        return None
    if form.get("type") != "json_schema":
        check_members(form, ("type",), "text.format")
        return form
    check_members(form, ("type", "name", "schema", "strict", "description"), "text.format")
    return {"type": "json_schema", "json_schema": {
        name: value for name, value in form.items() if name != "type" and value is not None}}
