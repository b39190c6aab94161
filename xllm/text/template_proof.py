"""Proves that a chat template shows what it is given, by rendering a copy of the conversation made of marks.

Many templates write the roles that they know and drop the others without a word (sglang#40082, llama.cpp#20215), or
drop a second system message, the calls of an assistant, or tools. In the copy every text is a word that occurs nowhere
else: what does not come out was dropped. What a template does depends on the shape of a conversation and hardly ever on
its words, so that one proof serves for all conversations of a shape.

Not looked for: the thinking of earlier turns, and text that an assistant wrote beside its calls. Both are the model's
own words, and its template decides which of them it is used to seeing again. Nor is the `name` of a participant, which
many clients send with every message: it tells two of one role apart where a template shows it.

Templates want the same conversation in different forms, and a message that one form loses another shows; `plans` are
these forms, the best first.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from xllm.errors import RequestError

# Members that a message may have whether or not the template reads them; the last three are names of one thing.
KNOWN_MEMBERS = frozenset({"role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning",
                           "thinking"})
# What clients keep beside a message for themselves, or for other services: earlier thinking again, signed; and more.
BOOKKEEPING = frozenset({"id", "cache_control", "provider_specific_fields", "thinking_blocks", "reasoning_details",
                         "annotations"})
INSTRUCTION_ROLES = ("system", "developer")


class JsonText(dict[str, Any]):
    """An object that came as JSON text: both, for templates. Printed and concatenated it is its text."""

    def __init__(self, value: Mapping[str, Any], text: str):
        super().__init__(value)
        self._text = text

    def __str__(self) -> str:
        return self._text

    def __add__(self, other: str) -> str:
        return self._text + other

    def __radd__(self, other: str) -> str:
        return other + self._text


class MarkedCopy:
    """chat, tools: of the same shape as the given ones, with marks for texts.

    chat: normalised messages, as the template gets them. shows_calls: whether an assistant's calls have to come out.
    """

    def __init__(self, chat: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], *, shows_calls: bool):
        self._shows_calls = shows_calls
        self._claims: list[tuple[tuple[str, ...], RequestError]] = []  # one of these marks has to come out
        self.chat = [self._message(index, message) for index, message in enumerate(chat)]
        self.tools = [self._tool(index, tool) for index, tool in enumerate(tools)]

    def missing(self, text: str) -> RequestError | None:
        """The complaint about the first thing that is not in `text`, the rendered copy."""
        text = text.lower()  # some write texts in capitals
        return next((complaint for marks, complaint in self._claims if not any(mark in text for mark in marks)), None)

    def missing_words(self, chat: Sequence[Mapping[str, Any]], text: str) -> RequestError | None:
        """As `missing`, for a template that cannot render marks: the chat's own words in the chat's own text."""
        for (index, message), marked in zip(enumerate(chat), self.chat, strict=True):
            content = message.get("content")
            texts = [str(part.get("text")) for part in content] if isinstance(content, list) else [str(content or "")]
            if marked["content"] != content and not all(words.strip() in text for words in texts):
                return RequestError(f"messages.{index}.role: the model's chat template drops a message of role "
                                    f"{message['role'][:64]!r} at this place", field="messages")
        return None

    def _mark(self, name: str, complaint: str, field: str = "messages") -> str:
        mark = f"qx7{name}w"
        self._claims.append(((mark,), RequestError(complaint, field=field)))
        return mark

    def _message(self, index: int, message: Mapping[str, Any]) -> dict[str, Any]:
        where, role = f"messages.{index}", message["role"]
        marked = dict(message)
        if calls := message.get("tool_calls"):
            marked["tool_calls"] = [self._call(where, index, number, call) for number, call in enumerate(calls)]
            return {"content": "", **marked}
        dropped = f"{where}.role: the model's chat template drops a message of role {role[:64]!r} at this place"
        content = message.get("content")
        if isinstance(content, list) and content:
            marked["content"] = [
                {**part, "text": self._mark(f"m{index}p{number}", dropped if not number else
                                            f"{where}.content.{number}: the model's chat template drops this part")}
                for number, part in enumerate(content)]
        else:
            mark = self._mark(f"m{index}", dropped)
            marked["content"] = mark if not isinstance(content, list) else [{"type": "text", "text": mark}]
        return marked

    def _call(self, where: str, index: int, number: int, call: Any) -> Any:
        complaint = f"{where}.tool_calls: the model's chat template does not show the calls of an assistant"
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict):
            return call
        arguments = function.get("arguments")
        name, value = f"qx7m{index}c{number}w", f"qx7m{index}a{number}w"  # some templates show the name, some the id
        if self._shows_calls:
            self._claims.append(((name, value), RequestError(complaint, field="messages")))
        marked = {**function, "name": name}
        if isinstance(arguments, dict):
            values = {**arguments, next(iter(arguments), "x"): value}
            marked["arguments"] = JsonText(values, json.dumps(values, ensure_ascii=False))
        return {**call, "function": marked} if "function" in call else marked

    def _tool(self, index: int, tool: Mapping[str, Any]) -> dict[str, Any]:
        mark = self._mark(f"t{index}", "tools: the model's chat template does not show tools to the model", "tools")
        if isinstance(tool.get("function"), Mapping):
            return {**tool, "function": {**tool["function"], "name": mark}}
        return {**tool, "name": mark}


def shape(chat: Sequence[Mapping[str, Any]], *rest: Any) -> bytes:
    """A digest of what a template's decisions depend on: of messages the roles and which members they have, not the
    words; `rest` as it stands."""
    rows = [(message["role"], _form(message.get("content")), len(message.get("tool_calls") or ()),
             sorted(message.keys() - {"role", "content"})) for message in chat]
    return hashlib.blake2b(repr((rows, rest)).encode(errors="replace"), digest_size=16).digest()


def _form(content: Any) -> Any:
    return len(content) if isinstance(content, list) else None if content is None else bool(content)


def plans(messages: Sequence[Mapping[str, Any]], *, knows_developer: bool,
          can_move: bool) -> list[list[Mapping[str, Any]]]:
    """The ways to give a template these messages, the best first.

    Besides where instructions stand (`instruction_plans`): some templates show an assistant's calls only if its content
    is null (DeepSeek R1 and V3), and some read the first part of a content only (Gemma 3).
    """
    ways = instruction_plans(messages, knows_developer=knows_developer, can_move=can_move)
    ways += [[_null_beside_calls(message) for message in way] for way in ways]
    ways += [[_joined(message) for message in way] for way in ways]
    return [way for index, way in enumerate(ways) if way not in ways[:index]]


def _null_beside_calls(message: Mapping[str, Any]) -> Mapping[str, Any]:
    return {**message, "content": None} if message.get("tool_calls") else message


def _joined(message: Mapping[str, Any]) -> Mapping[str, Any]:
    content = message.get("content")
    if not isinstance(content, list) or len(content) < 2:
        return message
    return {**message, "content": [{"type": "text", "text": _text_of(content)}]}


def instruction_plans(messages: Sequence[Mapping[str, Any]], *, knows_developer: bool,
                      can_move: bool) -> list[list[Mapping[str, Any]]]:
    """The ways to give a template its instructions (messages of role system or developer), the best first.

    A developer's message is OpenAI's later name for a system message, and is one to a template that does not know it.
    Some templates take instructions at the front only, some not at all or only while the user speaks last (Mistral): so
    the last two ways, if `can_move`, join them all at the front, and put them into the first message of the user.
    """
    as_system: list[Mapping[str, Any]] = [
        {**message, "role": "system"} if message["role"] == "developer" else message for message in messages]
    plans = [list(messages), as_system] if knows_developer else [as_system]
    instructions = [message for message in as_system if message["role"] == "system"]
    plain = all(message.keys() <= {"role", "content"} for message in instructions)
    if can_move and plain and instructions:
        text = "\n\n".join(_text_of(message.get("content")) for message in instructions)
        others = [message for message in as_system if message["role"] != "system"]
        plans.append([{"role": "system", "content": text}, *others])
        user = next((index for index, message in enumerate(others) if message["role"] == "user"), None)
        if user is not None:
            told = {**others[user], "content": f"{text}\n\n{_text_of(others[user].get('content'))}"}
            plans.append([*others[:user], told, *others[user + 1:]])
    return [plan for index, plan in enumerate(plans) if plan not in plans[:index]]


def _text_of(content: Any) -> str:
    if isinstance(content, list):
        return "\n".join(str(part.get("text", "")) for part in content)
    return str(content or "")
