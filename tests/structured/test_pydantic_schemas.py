"""Schemas as pydantic writes them are honoured, and the outputs are instances of the model; or they are refused with a
reason that docs/structured-output.md gives."""

from __future__ import annotations

import datetime
import enum
import ipaddress
import pathlib
import uuid
from decimal import Decimal
from typing import Annotated, Any, Generic, Literal, TypeVar

import pydantic
import pytest
from pydantic import AnyUrl, BaseModel, ConfigDict, Field, Json, SecretStr, TypeAdapter, conint, constr

from tests.structured.test_dead_ends import NUM_SEEDS, Writer
from xllm import StructuredOutput
from xllm.errors import RequestError
from xllm.structured.form_check import check_form
from xllm.structured.grammar_probe import DeadEnds

Item = TypeVar("Item")


class Closed(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Point(Closed):
    x: int
    y: float | None = None


class Tree(Closed):
    name: constr(max_length=2)  # type: ignore[valid-type]
    children: list[Tree] = Field(default=[], max_length=2)


class Cat(Closed):
    kind: Literal["cat"] = "cat"
    lives: conint(ge=0, le=9)  # type: ignore[valid-type]


class Dog(Closed):
    kind: Literal["dog", "hound"] = "dog"
    barks: bool = True


class RedFish(Closed):
    kind: Literal["fish"] = "fish"
    colour: Literal["red"] = "red"


class BlueFish(Closed):
    kind: Literal["fish"] = "fish"
    colour: Literal["blue"] = "blue"


Fish = Annotated[RedFish | BlueFish, Field(discriminator="colour")]


class Box(Closed, Generic[Item]):
    content: Item


Short = Annotated[str, pydantic.StringConstraints(max_length=3)]

# Types whose schema says all that their values need.
EXACT: dict[str, Any] = {
    "optional": Point, "recursive": Tree, "enum": Colour, "whole-number-enum": Level,
    "literal": Literal["a", 2, None, True],
    "date": datetime.date, "uuid": uuid.UUID, "address": ipaddress.IPv4Address,
    "path": pathlib.Path, "secret": SecretStr, "bytes": bytes, "conint": conint(gt=3, lt=9, multiple_of=2),
    "constr": constr(min_length=1, max_length=4, pattern=r"^[a-z]+$"), "record": dict[str, int],
    "record-of-names": dict[Colour, int], "record-of-some-names": dict[Literal["a", "b"], bool],
    "record-of-paths": dict[pathlib.Path, int],
    "tuple": tuple[int, bool], "list": Annotated[list[Short], Field(min_length=1, max_length=2)],
    "tagged-by-default": Annotated[Cat | Dog, Field(discriminator="kind")],
    "tagged-twice": Annotated[Cat | Fish, Field(discriminator="kind")],
    "union": int | bool | None, "generic": Box[Point], "generic-of-generic": Box[Box[Colour] | None],
}
# Types whose schema is looser than they are: pydantic refuses some texts that it allows.
LOOSE: dict[str, Any] = {"decimal": Decimal, "date-time": datetime.datetime, "time": datetime.time,
                         "duration": datetime.timedelta, "url": AnyUrl,
                         "record-of-patterns": dict[Annotated[str, Field(pattern="^[ab]{1,2}$")], int]}
# Of a text that holds JSON a schema says nothing that binds: `contentSchema` is an annotation.
UNBOUND = [Json[list[int]]]
REFUSED: dict[str, tuple[Any, str]] = {
    "set": (set[int], "uniqueItems"), "frozenset": (frozenset[str], "uniqueItems"),
    "record-of-dates": (dict[datetime.date, int], "propertyNames"),
}


@pytest.fixture(scope="module")
def vocabulary(source):
    return source.build()


@pytest.fixture(scope="module")
def written(source, vocabulary):
    """Outputs of a type's schema that have ended."""
    token_bytes, dead_ends = [bytes.fromhex(token) for token in source.token_bytes], DeadEnds()

    def write(kind: Any) -> tuple[TypeAdapter, list[str]]:
        adapter: TypeAdapter = TypeAdapter(kind)
        schema = adapter.json_schema()
        check_form(StructuredOutput(json=schema), dead_ends)
        writer = Writer(vocabulary, token_bytes, schema)
        return adapter, [text for seed in range(NUM_SEEDS) if (text := writer.write(seed)) is not None]

    return write


@pytest.mark.parametrize("kind", EXACT.values(), ids=EXACT)
def test_outputs_are_instances(written, kind):
    adapter, texts = written(kind)
    assert len(texts) > NUM_SEEDS // 4
    for text in texts:
        adapter.validate_json(text)


@pytest.mark.parametrize("kind", LOOSE.values(), ids=LOOSE)
def test_a_loose_schema_is_honoured(written, kind):
    adapter, texts = written(kind)
    assert len(texts) > NUM_SEEDS // 4
    assert any(_is_valid(adapter, text) for text in texts)


@pytest.mark.parametrize(("kind", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_honoured_is_refused(checker, kind, reason):
    with pytest.raises(RequestError, match=reason):
        checker.check(StructuredOutput(json=TypeAdapter(kind).json_schema()))


def test_a_model_of_everything(checker):
    """As a client sends it: one schema, definitions at its top."""
    fields = {f"f{index}": (kind, ...) for index, kind in enumerate([*EXACT.values(), *LOOSE.values(), *UNBOUND])}
    checker.check(StructuredOutput(json=pydantic.create_model("Everything", **fields).model_json_schema()))


def _is_valid(adapter: TypeAdapter, text: str) -> bool:
    try:
        adapter.validate_json(text)
    except pydantic.ValidationError:
        return False
    return True
