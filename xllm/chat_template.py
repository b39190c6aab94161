"""`ChatTemplate`: a checkpoint's Jinja template, rendered in a sandbox.

The environment is the one that Hugging Face templates are written for (the same filters, globals,
extensions and block trimming), so that a template gives the same text here and there. Templates come
with checkpoints and are not trusted: they see plain JSON data only, cannot change it, and have bounds
on their time and on what they make (`xllm/template_limits.py`).

The API's messages are more liberal than templates. Where a template can only read text, parts of text are
joined; where it can only read parts, text becomes one; and a call's arguments, JSON text in the API, are
text to a template that reads text and an object to one that reads objects.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser

from xllm.errors import ModelError, RequestError
from xllm.template_limits import MAX_SECONDS, MAX_TEXT_CHARS, LimitedEnvironment
from xllm.template_weights import TemplateLimitError

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
        self._environment = _environment()
        try:
            self._template = self._environment.from_string(source)
            self._content_form = _content_form(self._environment.parse(source))
        except Exception as error:  # a syntax error; or what hostile nesting does to compilers
            raise ModelError(f"the chat template does not compile: {error}") from error
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        max_seconds: float = MAX_SECONDS,
        **variables: Any,
    ) -> str:
        """The prompt text. `variables` are handed to the template and win over special tokens.

        continue_final_message: end the prompt inside the last message, so that the model goes on with it.

        Raises:
            RequestError: the messages are malformed, the template refuses them (`raise_exception`), or it takes
                too long or makes too much.
        """
        if continue_final_message and add_generation_prompt:
            raise RequestError("continue_final_message and add_generation_prompt exclude each other",
                               field="continue_final_message")
        chat = [_normalised(message, self._content_form) for message in _checked(messages)]
        if continue_final_message:
            _mark_final(chat)
        scope = {**self._special_tokens, "documents": None, **_plain(variables), "messages": chat,
                 "tools": _plain(tools) if tools else None, "add_generation_prompt": add_generation_prompt}
        try:
            text = self._generate(scope, max_seconds)
        except Exception as error:  # a template can raise anything that Python code can
            raise RequestError(f"the chat template refused the messages: {error}", field="messages") from error
        return _cut_at_mark(text) if continue_final_message else text

    def _generate(self, scope: dict[str, Any], max_seconds: float) -> str:
        pieces, num_chars = [], 0
        with self._environment.limited(max_seconds, time.monotonic()):
            for piece in self._template.generate(scope):
                self._environment.tick()
                pieces.append(piece)
                num_chars += len(piece)
                if num_chars > MAX_TEXT_CHARS:
                    raise TemplateLimitError(f"it makes more than {MAX_TEXT_CHARS} characters")
        return "".join(pieces)


def select_template(templates: Mapping[str, str], *, with_tools: bool) -> str | None:
    """A checkpoint may name several templates: `tool_use` serves requests with tools, `default` the others."""
    if with_tools and "tool_use" in templates:
        return templates["tool_use"]
    return templates.get("default")


def _environment() -> LimitedEnvironment:
    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def check_name(name: Any) -> None:
        if str(name).startswith("_"):
            raise jinja2.exceptions.SecurityError(f"namespace attribute {name!r} is not allowed")

    class Namespace(jinja2.utils.Namespace):  # type: ignore[misc]
        """Jinja's namespace without underscore names, which would reach into CPython."""

        def __init__(*args: Any, **kwargs: Any) -> None:  # no name of ours may hide an attribute called `self`
            own, args = args[0], args[1:]
            attributes = dict(*args, **kwargs)
            for name in attributes:
                check_name(name)
            jinja2.utils.Namespace.__init__(own, attributes)

        def __setitem__(self, name: str, value: Any) -> None:
            check_name(name)
            super().__setitem__(name, value)

    class Dict:
        """The `dict` of templates: it makes dicts and has no other attributes."""

        def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
            return dict(*args, **kwargs)

        def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
            return dict.fromkeys(*args, **kwargs)

    environment = LimitedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_generation_tag(), jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.tests["string"] = lambda value: isinstance(value, (str, JsonText))
    environment.globals["dict"] = Dict()
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    environment.globals["namespace"] = Namespace
    environment.guard_filters()
    return environment


def _generation_tag() -> type[jinja2.ext.Extension]:
    """`{% generation %} ... {% endgeneration %}` marks assistant text for training; here it only renders it."""

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


def _normalised(message: Message, content_form: str) -> dict[str, Any]:
    """Plain data without null members (templates print 'None' for them), reasoning under every usual name."""
    plain: dict[str, Any] = _plain({k: v for k, v in message.items() if v is not None})
    content = plain.get("content")
    if content_form == "text" and isinstance(content, list):
        plain["content"] = _joined_parts(content)
    elif content_form == "parts" and isinstance(content, str):
        plain["content"] = [{"type": "text", "text": content}] if content else []
    for call in plain.get("tool_calls") or ():
        function = call.get("function", call) if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            function["arguments"] = _json_text(function["arguments"])
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


def _json_text(text: str) -> JsonText | str:
    """The object in `text`; `text` itself if it holds none."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return text
    return JsonText(value, text) if isinstance(value, dict) else text


def _joined_parts(parts: list[Any]) -> Any:
    """The text of parts that are all text; otherwise the parts as they are, for the template to refuse."""
    texts: list[Any] = [part.get("text") if isinstance(part, dict) else part for part in parts]
    return "\n".join(texts) if all(isinstance(text, str) for text in texts) else parts


def _content_form(tree: nodes.Template) -> str:
    """What a template takes a message's content for: "text", "parts" or "either", as far as its loops and tests say."""
    names = {"content"}
    for assigned in tree.find_all(nodes.Assign):
        if isinstance(assigned.target, nodes.Name) and _is_content(_unfiltered(assigned.node), names):
            names.add(assigned.target.name)
    if not any(_is_content(_unfiltered(loop.iter), names) for loop in tree.find_all(nodes.For)):
        return "text"
    tests = (test for test in tree.find_all(nodes.Test) if test.name in ("string", "iterable", "sequence"))
    return "either" if any(_is_content(test.node, names) for test in tests) else "parts"


def _unfiltered(node: nodes.Node) -> nodes.Node:
    while isinstance(node, nodes.Filter) and node.node is not None:
        node = node.node
    return node


def _is_content(node: nodes.Node, names: set[str]) -> bool:
    if isinstance(node, nodes.Name):
        return node.name in names
    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    return isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const) and node.arg.value == "content"


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
