"""`ChatTemplate`: a checkpoint's Jinja template, rendered in a sandbox.

The environment is the one that Hugging Face templates are written for (the same filters, globals,
extensions and block trimming), so that a template gives the same text here and there. Templates come
with checkpoints and are not trusted: they see plain JSON data only, cannot change it, and have bounds
on their time and on what they make (`xllm/text/template_limits.py`).

What a template drops without a word is refused by name, or given in another way where there is one: see
`xllm/text/template_proof.py`.

The API's messages are more liberal than templates. Where a template can only read text, parts of text are
joined; where it can only read parts, text becomes one; and a call's arguments, JSON text in the API, are
text to a template that reads text and an object to one that reads objects.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
from jinja2 import nodes
from jinja2.parser import Parser

from xllm.errors import ModelError, RequestError
from xllm.text.template_limits import MAX_SECONDS, MAX_TEXT_CHARS, LimitedEnvironment
from xllm.text.template_proof import BOOKKEEPING, INSTRUCTION_ROLES, KNOWN_MEMBERS, JsonText, MarkedCopy, plans, shape
from xllm.text.template_weights import TemplateLimitError

Message = Mapping[str, Any]

_THINKING_SWITCHES = ("enable_thinking", "thinking")
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
MAX_PROVEN = 4096  # shapes of conversations that are remembered, 16 bytes each. Chosen: bounds memory
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
            tree = self._environment.parse(source)
            self._content_form, self._members = _content_form(tree), _read_members(tree)
            self._variables = jinja2.meta.find_undeclared_variables(tree)  # folds constants: the tree is spent
        except Exception as error:  # a syntax error; or what hostile nesting does to compilers
            raise ModelError(f"the chat template does not compile: {error}") from error
        self._special_tokens = dict(special_tokens)
        self._thinks = "think" in source  # one that does not needs no switch to turn it off
        self._proven: dict[bytes, int] = {}  # shape of a conversation -> the plan that shows all of it

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        needs_tools: bool = True,
        needs_calls: bool = True,
        max_seconds: float = MAX_SECONDS,
        **variables: Any,
    ) -> str:
        """The prompt text. `variables` are handed to the template and win over special tokens.

        continue_final_message: end the prompt inside the last message, so that the model goes on with it.
        needs_tools: tools that the template does not show are an error; False: they reach the output another way.
        needs_calls: the same for an assistant's earlier calls; False: the model is told of them by its training.

        Raises:
            RequestError: the messages are malformed, the template refuses them (`raise_exception`) or drops one of
                them, or it takes too long or makes too much.
        """
        if continue_final_message and add_generation_prompt:
            raise RequestError("continue_final_message and add_generation_prompt exclude each other",
                               field="continue_final_message")
        variables = {name: value for name, value in variables.items()
                     if name in self._variables or not self._is_said_otherwise(name, value, variables)}
        if unread := sorted(variables.keys() - self._variables):
            raise RequestError(f"chat_template_kwargs.{unread[0][:64]}: the model's chat template does not read this "
                               "variable", field="chat_template_kwargs")
        scope = {**self._special_tokens, "documents": None, **_plain(variables),
                 "tools": _plain(tools) if tools else None, "add_generation_prompt": add_generation_prompt}
        wish = _Wish(scope, continue_final_message, needs_tools, needs_calls, max_seconds, time.monotonic())
        given = [self._with_known_members(index, message) for index, message in enumerate(_checked(messages))]
        ways = plans(given, knows_developer="developer" in self._members,
                     can_move=not continue_final_message or given[-1]["role"] not in INSTRUCTION_ROLES)
        key = shape(ways[0], wish.num_tools, needs_tools, needs_calls, continue_final_message, add_generation_prompt,
                    sorted(variables.items()))
        if (known := self._proven.get(key)) is not None:
            return self._rendered(ways[known], wish)
        found, text = self._first_proven(ways, wish)
        if found is not None:
            if len(self._proven) >= MAX_PROVEN:
                self._proven.clear()
            self._proven[key] = found
        return text

    def _is_said_otherwise(self, name: str, value: Any, variables: Mapping[str, Any]) -> bool:
        """Whether a thinking switch that the template does not read asks for nothing new: another switch says the same,
        or it turns off what the model does not do."""
        if name not in _THINKING_SWITCHES:
            return False
        said = [variables[other] for other in _THINKING_SWITCHES if other in self._variables and other in variables]
        return value in said if said else value is False and not self._thinks

    def _first_proven(self, ways: Sequence[Sequence[Message]], wish: _Wish) -> tuple[int | None, str]:
        """The first way in which the template shows every message: (its number, or None if that is proven for these
        words only; its text). Raises the first way's RequestError if there is none."""
        first: RequestError | None = None
        for index, way in enumerate(ways):
            try:
                text = self._rendered(way, wish)
                complaint, for_all_words = self._missing(way, wish, text)
                if complaint is None:
                    return index if for_all_words else None, text
            except RequestError as error:
                complaint = error
            first = first or complaint
        assert first is not None
        raise first

    def _rendered(self, messages: Sequence[Message], wish: _Wish) -> str:
        chat = [_normalised(message, self._content_form) for message in messages]
        if wish.continues:
            _mark_final(chat)
        text = self._generate({**wish.scope, "messages": chat}, wish)
        return _cut_at_mark(text) if wish.continues else text

    def _missing(self, messages: Sequence[Message], wish: _Wish, text: str) -> tuple[RequestError | None, bool]:
        """What the template drops of the messages, and whether that holds for other words too. text: the rendered
        messages."""
        chat = [_normalised(message, self._content_form) for message in messages]
        copy = MarkedCopy(chat, wish.scope["tools"] or () if wish.needs_tools else (), shows_calls=wish.needs_calls)
        scope = {**wish.scope, "messages": copy.chat, "tools": copy.tools or wish.scope["tools"]}
        try:
            return copy.missing(self._generate(scope, wish)), True
        except RequestError:  # it looks into the words: then they themselves have to be there
            return copy.missing_words(chat, text), False

    def _generate(self, scope: dict[str, Any], wish: _Wish) -> str:
        pieces, num_chars = [], 0
        try:
            with self._environment.limited(wish.max_seconds, wish.since_s):
                for piece in self._template.generate(scope):
                    self._environment.tick()
                    pieces.append(piece)
                    num_chars += len(piece)
                    if num_chars > MAX_TEXT_CHARS:
                        raise TemplateLimitError(f"it makes more than {MAX_TEXT_CHARS} characters")
        except Exception as error:  # a template can raise anything that Python code can
            raise RequestError(f"the chat template refused the messages: {error}", field="messages") from error
        return "".join(pieces)

    def _with_known_members(self, index: int, message: Message) -> Message:
        """The message without members that say nothing. Raises RequestError for one that the template does not read."""
        unread = message.keys() - KNOWN_MEMBERS - self._members
        unread_words = unread - BOOKKEEPING
        if named := sorted(str(name) for name in unread_words if message[name] not in (None, "", [], {}, False)):
            raise RequestError(f"messages.{index}.{named[0][:64]}: the model's chat template does not read this member",
                               field="messages")
        known = {name: value for name, value in message.items() if name not in unread}
        if not known.get("tool_calls"):
            known.pop("tool_calls", None)
        return {**known, "content": "" if known.get("content") is None else known["content"]}


@dataclass(frozen=True)
class _Wish:
    """scope: the template's variables but for `messages`. All renderings together may take max_seconds, from since_s on
    the `time.monotonic()` clock."""

    scope: dict[str, Any]
    continues: bool
    needs_tools: bool
    needs_calls: bool
    max_seconds: float
    since_s: float

    @property
    def num_tools(self) -> int:
        return len(self.scope["tools"] or ())


@functools.lru_cache(maxsize=8)
def template_variables(sources: tuple[str, ...]) -> frozenset[str]:
    """The variables that templates read, such as `enable_thinking`. Raises ModelError if one does not compile."""
    environment, found = _environment(), set[str]()
    for source in sources:
        try:
            found |= jinja2.meta.find_undeclared_variables(environment.parse(source))
        except Exception as error:
            raise ModelError(f"the chat template does not compile: {error}") from error
    return frozenset(found)


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
        content = message.get("content")
        for number, part in enumerate(content if isinstance(content, (list, tuple)) else ()):
            if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
                raise RequestError(f"messages.{index}.content.{number}: only parts of text are supported",
                                   field="messages")
    return messages


def _read_members(tree: nodes.Template) -> set[str]:
    """The names of attributes that a template asks for anywhere, and its words, which may be keys or roles."""
    names = {node.attr for node in tree.find_all(nodes.Getattr)}
    return names | {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}


def _normalised(message: Message, content_form: str) -> dict[str, Any]:
    """Plain data without null members (templates print 'None' for them), reasoning under every usual name."""
    plain: dict[str, Any] = _plain({k: v for k, v in message.items() if v is not None})
    if message.get("content", "") is None and message.get("tool_calls"):
        plain["content"] = None  # see `template_proof.plans`
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
