"""The fields that say which form an output must have: OpenAI's `response_format`, vLLM's `structured_outputs`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from serving.api.errors import ApiError, invalid, unavailable
from serving.api.state import ServerState
from serving.api.types import GenerationBody
from serving.observe.metrics.refusals import OVERLOAD
from xllm.errors import RequestError
from xllm.request import SamplingParams
from xllm.structured.checker import GrammarBusyError
from xllm.structured.spec import KINDS, StructuredOutput

# What may stand beside `type`, by its value.
_FORMATS: dict[str, tuple[str, ...]] = {
    "text": (), "json_object": ("schema",), "json_schema": ("json_schema",),
    "structural_tag": ("structures", "triggers"),
}
_SCHEMA_MEMBERS: dict[str, tuple[type, str]] = {
    "name": (str, "a text"), "description": (str, "a text"), "strict": (bool, "true or false"),
    "schema": (dict, "a JSON schema, an object"),
}
# vLLM's switches and the values of them that ask for nothing.
_SWITCHES: dict[str, tuple[Any, ...]] = {
    "disable_any_whitespace": (False, None), "disable_fallback": (True, False, None), "whitespace_pattern": (None,),
    "disable_additional_properties": (False, None), "json_object": (False, None, True),
}


def read_structured(body: GenerationBody) -> StructuredOutput | None:
    """The form that the body asks for, or None. Raises ApiError that names the field."""
    by_format = None if body.response_format is None else _read_format(body.response_format)
    wishes = {k: v for k, v in (body.structured_outputs or {}).items() if v is not None}
    if not wishes:
        return by_format
    if by_format is not None:
        raise invalid("response_format and structured_outputs both say which form the output must have; send one",
                      "structured_outputs")
    return _read_wishes(wishes)


def _read_format(wish: dict[str, Any]) -> StructuredOutput | None:
    kind = wish.get("type")
    if not isinstance(kind, str) or kind not in _FORMATS:
        raise invalid(f"response_format.type must be one of {', '.join(_FORMATS)}; got {str(kind)[:64]!r}",
                      "response_format")
    given = {name: value for name, value in wish.items() if name != "type" and value is not None}
    for name in given:
        if name not in _FORMATS[kind]:
            hint = "; it belongs within json_schema" if kind == "json_schema" and name in _SCHEMA_MEMBERS else ""
            raise invalid(f"response_format.{name[:64]} is unknown where type is {kind!r}{hint}", "response_format")
    if kind == "text":
        return None
    if kind == "structural_tag":
        return _make("response_format", {"structural_tag": given})
    if kind == "json_schema":
        return _make("response_format", {"json": _schema_of(given.get("json_schema"))})
    return _make("response_format", {"json": _checked_schema("schema", given.get("schema", {"type": "object"}))})


def _schema_of(wish: Any) -> dict[str, Any]:
    """OpenAI's `json_schema`: its name and description say nothing to a form, and a schema binds, strict or not."""
    if not isinstance(wish, dict):
        raise invalid("response_format.json_schema must be an object", "response_format")
    for name, value in wish.items():
        if name not in _SCHEMA_MEMBERS:
            raise invalid(f"response_format.json_schema.{name[:64]} is unknown", "response_format")
        kind, what = _SCHEMA_MEMBERS[name]
        if value is not None and not isinstance(value, kind):
            raise invalid(f"response_format.json_schema.{name} must be {what}", "response_format")
    return _checked_schema("json_schema.schema", wish.get("schema"))


def _checked_schema(member: str, schema: Any) -> dict[str, Any]:
    if not isinstance(schema, dict):
        raise invalid(f"response_format.{member} must be a JSON schema, an object", "response_format")
    return schema


def _read_wishes(wishes: dict[str, Any]) -> StructuredOutput | None:
    for name, value in wishes.items():
        if name in _SWITCHES:
            if not any(value is allowed for allowed in _SWITCHES[name]):
                raise invalid(f"structured_outputs.{name} is not supported", "structured_outputs")
        elif name not in KINDS:
            raise invalid(f"structured_outputs: unknown key {name[:64]!r}; known are {', '.join(KINDS)}",
                          "structured_outputs")
    given = {name: value for name, value in wishes.items() if name in KINDS}
    if wishes.get("json_object"):
        given.setdefault("json", "object")
    return _make("structured_outputs", given) if given else None


def _make(field: str, given: dict[str, Any]) -> StructuredOutput:
    try:
        return StructuredOutput(**given)
    except RequestError as error:
        raise invalid(f"{field}: {error}", field) from None


def field_of(body: GenerationBody) -> str:
    """The field that a structured output of this body comes from; if from neither, it was made for `tools`."""
    if body.structured_outputs:
        return "structured_outputs"
    wish = body.response_format
    return "tools" if wish is None or wish.get("type") == "text" else "response_format"


async def check_structured(state: ServerState, body: GenerationBody, samplings: Sequence[SamplingParams]) -> None:
    """Have the form compiled in another process, and wait for it. Raises ApiError that names the field, or 503 if too
    many ask."""
    for spec in {sampling.structured for sampling in samplings} - {None}:
        assert spec is not None
        state.need_tokenizer(field_of(body))
        try:
            await asyncio.wrap_future(state.inputs.grammars.submit(spec))
        except GrammarBusyError as error:
            state.refusals.note(OVERLOAD)
            raise unavailable(str(error)) from None
        except RequestError as error:
            raise ApiError(400, f"{field_of(body)}: {error}", param=field_of(body)) from None
