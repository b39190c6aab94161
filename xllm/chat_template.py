"""`ChatTemplate`: a checkpoint's Jinja template, rendered in a sandbox.

The environment is the one that Hugging Face templates are written for (the same filters, globals,
extensions and block trimming), so that a template gives the same text here and there. Templates come
with checkpoints and are not trusted: they see plain JSON data only, and cannot change it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from xllm.errors import ModelError, RequestError

if TYPE_CHECKING:
    import jinja2

Message = Mapping[str, Any]

_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
_CONTINUE_MARK = "\u2063continue\u2063"


class ChatTemplate:
    """One compiled template.

    source: Jinja text. special_tokens: variables such as `bos_token`, visible to the template.

    Raises:
        ModelError: the template does not compile.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]):
        import jinja2

        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ModelError(f"the chat template does not compile: {error}") from error
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt text. `variables` are handed to the template and win over special tokens.

        continue_final_message: end the prompt inside the last message, so that the model goes on with it.

        Raises:
            RequestError: the messages are malformed, or the template refuses them (`raise_exception`).
        """
        if continue_final_message and add_generation_prompt:
            raise RequestError("continue_final_message and add_generation_prompt exclude each other",
                               field="continue_final_message")
        chat = [_normalised(message) for message in _checked(messages)]
        if continue_final_message:
            _mark_final(chat)
        scope = {**self._special_tokens, "documents": None, **_plain(variables), "messages": chat,
                 "tools": _plain(tools) if tools else None, "add_generation_prompt": add_generation_prompt}
        try:
            text: str = self._template.render(scope)
        except Exception as error:  # a template can raise anything that Python code can
            raise RequestError(f"the chat template refused the messages: {error}", field="messages") from error
        return _cut_at_mark(text) if continue_final_message else text


def select_template(templates: Mapping[str, str], *, with_tools: bool) -> str | None:
    """A checkpoint may name several templates: `tool_use` serves requests with tools, `default` the others."""
    if with_tools and "tool_use" in templates:
        return templates["tool_use"]
    return templates.get("default")


def _environment() -> jinja2.Environment:
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    class Namespace(jinja2.utils.Namespace):  # type: ignore[misc]
        """Jinja's namespace without underscore names, which would reach into CPython."""

        def __setitem__(self, name: str, value: Any) -> None:
            if str(name).startswith("_"):
                raise jinja2.exceptions.SecurityError(f"namespace attribute {name!r} is not allowed")
            super().__setitem__(name, value)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_generation_tag(), jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    environment.globals["namespace"] = Namespace
    return environment


def _generation_tag() -> type[jinja2.ext.Extension]:
    """`{% generation %} ... {% endgeneration %}` marks assistant text for training; here it only renders it."""
    import jinja2.ext
    from jinja2 import nodes
    from jinja2.parser import Parser

    class GenerationTag(jinja2.ext.Extension):
        tags = {"generation"}  # noqa: RUF012 - jinja's own attribute

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    return GenerationTag


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None,
            separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
    """Unlike Jinja's own filter it escapes nothing for HTML, and it leaves non-ASCII text readable."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _checked(messages: Sequence[Message]) -> Sequence[Message]:
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence) or not messages:
        raise RequestError("messages must be a non-empty list", field="messages")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise RequestError(f"messages[{index}] must be an object with 'role' and 'content'", field="messages")
        if not isinstance(message.get("role"), str):
            raise RequestError(f"messages[{index}].role must be a string", field="messages")
    return messages


def _normalised(message: Message) -> dict[str, Any]:
    """Plain data without null members (templates print 'None' for them), reasoning under every usual name."""
    plain: dict[str, Any] = _plain({k: v for k, v in message.items() if v is not None})
    reasoning = next((plain[key] for key in _REASONING_KEYS if key in plain), None)
    if reasoning is not None:
        plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    return plain


def _plain(value: Any) -> Any:
    """Rebuild `value` from JSON types only; anything else becomes a placeholder that names its type."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {_plain(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return f"<{type(value).__name__}>"


def _mark_final(chat: list[dict[str, Any]]) -> None:
    final = chat[-1]
    if isinstance(final.get("content"), str):
        final["content"] += _CONTINUE_MARK
        return
    for part in reversed(final.get("content") or []):
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            part["text"] += _CONTINUE_MARK
            return
    raise RequestError("continue_final_message: the last message has no text to continue", field="messages")


def _cut_at_mark(text: str) -> str:
    head, mark, _ = text.rpartition(_CONTINUE_MARK)
    if not mark:
        raise RequestError("continue_final_message: the chat template drops the last message", field="messages")
    return head
