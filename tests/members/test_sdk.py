"""The walk over declared types finds every path, and the smallest values are of these types."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from typing_extensions import Required, TypedDict

from tests.members.sdk import paths
from tests.members.values import Made, body_with, smallest


class Text(TypedDict, total=False):
    type: Required[Literal["text"]]
    text: Required[str]
    mark: bool


class Image(TypedDict):
    type: Literal["image"]
    size: int


class Tree(TypedDict, total=False):
    parts: Iterable[Text | Image]
    below: Iterable[Tree]


class Options(TypedDict, total=False):
    level: Literal["low", "high"] | None


class Params(TypedDict, total=False):
    content: Required[str | Iterable[Text | Image]]
    choice: Literal["none"] | Text | Image
    options: Options | None
    named: dict[str, Options]
    tree: Tree


ALL = ["content", "content[type=text]", "content[type=text].text", "content[type=text].mark", "content[type=image]",
       "content[type=image].size", "choice", "choice(type=text)", "choice(type=text).text", "choice(type=text).mark",
       "choice(type=image)", "choice(type=image).size", "options", "options.level", "named", "named{}",
       "named{}.level", "tree", "tree.parts", "tree.parts[type=text]", "tree.parts[type=text].text",
       "tree.parts[type=text].mark", "tree.parts[type=image]", "tree.parts[type=image].size", "tree.below",
       "tree.below[]"]


def test_every_path_is_found() -> None:
    assert [path.text for path in paths(Params)] == ALL


def test_nothing_below_a_stop_is() -> None:
    stops = {"content[type=text]", "choice", "tree.parts"}
    below = [text for text in ALL if any(text.startswith(stop) and text != stop for stop in stops)]
    assert [path.text for path in paths(Params, stops)] == [text for text in ALL if text not in below]


def test_bodies_that_have_a_member() -> None:
    known = {path.text: path for path in paths(Params)}

    def made(text: str, **around: Any) -> dict[str, Any]:
        return body_with(known[text], known, Made({"content": ["before"]}, **around))

    assert made("content[type=text].mark") == {"content": ["before", {"type": "text", "text": "x", "mark": True}]}
    assert made("choice(type=image)") == {"content": ["before"], "choice": {"type": "image", "size": 2}}
    assert made("options.level") == {"content": ["before"], "options": {"level": "high"}}
    assert made("named{}.level", company={"named{}": {"more": 1}}) == {
        "content": ["before"], "named": {"x": {"more": 1, "level": "high"}}}
    assert made("options.level", beside={"options": {"more": 1}}, instead={"options.level": "low"}) == {
        "content": ["before"], "more": 1, "options": {"level": "low"}}
    assert smallest(Params) == {"content": "x"} and smallest(Tree) == {}
