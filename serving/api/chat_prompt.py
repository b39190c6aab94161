"""Turns the messages of a request into the prompt's tokens, by the model's chat template."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

from serving.api.call_weight import check_texts
from serving.api.effort import effort_variables, verbosity_variables
from serving.api.errors import invalid
from serving.api.members import check_members
from serving.api.state import ServerState
from serving.api.text_work import BRIEF_S, LONG
from serving.api.tools import ToolWish
from serving.api.types import ChatBody, ChatMessage, TokenizeBody
from xllm.errors import ModelError, RequestError

# What a caller may not set through chat_template_kwargs: our own arguments, and the template itself.
RESERVED_KWARGS = frozenset({"messages", "tools", "tokenize", "chat_template", "add_generation_prompt",
                             "continue_final_message", "documents", "field", "self",
                             "max_seconds", "needs_tools", "needs_calls"})
PART_MEMBERS = frozenset({"type", "text", "cache_control", "prompt_cache_breakpoint"})  # caching needs no marks here
CALL_MEMBERS = frozenset({"id", "type", "function", "index"})  # index: in calls put together from a stream
BRIEF_MEMBERS = frozenset({"role", "content"})
MESSAGE_SIZE = 64  # that a message counts for beside its text, in characters. Chosen: so many take a template as long
TAIL_CHARS = 64  # of the prompt's end that are kept. Chosen: a thinking tag and the line breaks around it are shorter


async def chat_prompt(state: ServerState, body: ChatBody | TokenizeBody, messages: list[ChatMessage],
                      tools: ToolWish) -> tuple[list[int], str]:
    """The prompt's token ids, and the end of its text, which may open or close the model's thinking. A template is
    foreign code and may be slow: rendering runs in a thread, unless little text is done with in a moment.

    Raises:
        ApiError, RequestError: what is wrong with the messages, the variables or the template.
    """
    tokenizer = state.need_tokenizer("messages")
    limits = state.config.limits
    variables = checked_variables(body.chat_template_kwargs, limits.max_template_variable_chars)
    template = checked_template(state, getattr(body, "chat_template", None))
    plain = plain_messages(messages)
    # An operator who names `--tool-call-parser` may have a model that is told of its tools by its training or by the
    # messages. A forced call is held to its function by the form of the output, whatever the template shows.
    shows_tools = state.config.chat.tool_call_parser == "auto"

    def encode(max_seconds: float, max_chars: int | None = None) -> tuple[list[int], str]:
        def check(text: str) -> None:
            if max_chars is not None and len(text) > max_chars:
                raise _NotBriefError
            if len(text) > limits.max_rendered_chars:
                raise invalid(f"the chat template makes more than {limits.max_rendered_chars} characters of the "
                              "messages", "messages")
            check_texts(state, [text], "messages")

        wished = _wished_variables(state, body, variables)
        text, token_ids = tokenizer.encode_chat(
            plain, check, bool(body.add_special_tokens), add_generation_prompt=body.add_generation_prompt,
            tools=tools.tools or None, continue_final_message=body.continue_final_message, chat_template=template,
            needs_tools=shows_tools and not tools.is_forced, needs_calls=shows_tools,
            max_seconds=max_seconds, **{**variables, **wished})
        return token_ids, text[-TAIL_CHARS:]

    def encode_at_once() -> tuple[list[int], str] | None:
        """None: that is no matter of a moment."""
        began_s, began_cpu_s, done = time.monotonic(), time.thread_time(), None
        try:
            done = encode(BRIEF_S, 2 * LONG)
        except _NotBriefError:
            state.text_work.note_slow()
        except RequestError:
            if time.monotonic() - began_s < BRIEF_S:  # it was not cut short
                raise
        if time.thread_time() - began_cpu_s > BRIEF_S / 4:
            state.text_work.note_slow()
        elif done is not None:
            state.text_work.note_brief()
        return done

    size, most_s = sum(map(num_chars, plain)), state.config.chat.chat_template_timeout
    is_brief = (size + MESSAGE_SIZE * len(plain) <= LONG and template is None and not variables and not tools.tools
                and most_s > BRIEF_S and all(message.keys() <= BRIEF_MEMBERS for message in plain))
    try:
        if is_brief and state.text_work.may_be_brief() and (done := encode_at_once()) is not None:
            return done
        return await state.text_work.run(max(LONG + 1, size), partial(encode, most_s))
    except ModelError as error:  # no template, or none that compiles
        raise invalid(str(error), "messages" if template is None else "chat_template") from None


class _NotBriefError(Exception):
    """The template makes much of little."""


def checked_variables(variables: dict[str, Any] | None, max_chars: int) -> dict[str, Any]:
    """`chat_template_kwargs`, within bounds. Raises ApiError."""
    if not variables:
        return {}
    for name in variables:
        if name in RESERVED_KWARGS or not name.isidentifier():
            raise invalid(f"chat_template_kwargs may not set {name[:64]!r}", "chat_template_kwargs")
    if len(json.dumps(variables)) > max_chars:
        raise invalid(f"chat_template_kwargs may hold at most {max_chars} characters of JSON", "chat_template_kwargs")
    return variables


def _wished_variables(state: ServerState, body: ChatBody | TokenizeBody, given: dict[str, Any]) -> dict[str, Any]:
    """What `reasoning_effort` and `verbosity` come to. Raises ApiError, also where
    `chat_template_kwargs` say otherwise."""
    if not isinstance(body, ChatBody):
        return {}
    template = checked_template(state, body.chat_template)
    for field, found in (
            ("reasoning_effort", effort_variables(state, body.reasoning_effort, "reasoning_effort", template)),
            ("verbosity", verbosity_variables(state, body.verbosity, "verbosity", template))):
        for name, value in found.items():
            if given.get(name, value) != value:
                raise invalid(f"{field} and chat_template_kwargs.{name} contradict each other", field)
        given = {**given, **found}
    return given


def checked_template(state: ServerState, template: str | None) -> str | None:
    """The request's own template, where that is allowed. Raises ApiError."""
    if template is None:
        return None
    if not state.config.chat.trust_request_chat_template:
        raise invalid("chat_template is refused: this server was started without --trust-request-chat-template",
                      "chat_template")
    most = state.config.limits.max_template_chars
    if not 0 < len(template) <= most:
        raise invalid(f"chat_template must have 1 to {most} characters", "chat_template")
    return template


def num_chars(message: Mapping[str, Any]) -> int:
    """About how many characters the message's text has."""
    content = message["content"]
    return len(content) if isinstance(content, str) else sum(len(part.get("text") or "") for part in content)


def plain_messages(messages: list[ChatMessage]) -> list[dict[str, Any]]:
    """Messages as data for templates. Raises ApiError for what is malformed or not built."""
    if not messages:
        raise invalid("messages must not be empty", "messages")
    return [_plain_message(index, message) for index, message in enumerate(messages)]


def _plain_message(index: int, message: ChatMessage) -> dict[str, Any]:
    extra = {k: v for k, v in (message.model_extra or {}).items() if v is not None}
    for name in ("function_call", "audio"):
        if extra.get(name):
            raise invalid(f"messages.{index}.{name} is not supported", "messages")
    calls = extra.pop("tool_calls", None)
    if calls:
        extra["tool_calls"] = _checked_calls(index, message.role, calls)
    if "tool_call_id" in extra and message.role != "tool":
        raise invalid(f"messages.{index}.tool_call_id: only messages of role tool answer a call", "messages")
    content = message.content
    if message.role == "assistant" and isinstance(refusal := extra.pop("refusal", None), str):
        content = content or refusal  # what it said, in the SDK's own way of writing it down
    if isinstance(content, list):
        for number, part in enumerate(content):
            _check_part(part, f"messages.{index}.content.{number}")
    return {**extra, "role": message.role, "content": content if content is not None else ""}


def _checked_calls(index: int, role: str, calls: Any) -> list[dict[str, Any]]:
    """An earlier answer's calls. `arguments` may be JSON text, as the API has it, or an object."""
    where = f"messages.{index}.tool_calls"
    if role != "assistant":
        raise invalid(f"{where}: only assistant messages have tool calls", "messages")
    if not isinstance(calls, list):
        raise invalid(f"{where} must be a list", "messages")
    for number, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise invalid(f"{where}.{number} must be {{id, type, function: {{name, arguments}}}}", "messages")
        if not isinstance(function.get("arguments", ""), (str, dict)):
            raise invalid(f"{where}.{number}.function.arguments must be a string of JSON or an object", "messages")
        if call.get("type", "function") != "function":
            raise invalid(f"{where}.{number}: calls of type {str(call['type'])[:64]!r} are not supported", "messages")
        check_members(call, CALL_MEMBERS, f"{where}.{number}")
        check_members(function, ("name", "arguments"), f"{where}.{number}.function")
    return calls


def _check_part(part: dict[str, Any], where: str) -> None:
    kind = part.get("type")
    if kind != "text":
        raise invalid(f"{where}: parts of type {str(kind)[:64]!r} are not supported; only text", "messages")
    if not isinstance(part.get("text"), str):
        raise invalid(f"{where}: a text part needs a string 'text'", "messages")
    check_members(part, PART_MEMBERS, where)
