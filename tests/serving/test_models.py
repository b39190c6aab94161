"""The list of models, in pages as Anthropic's clients ask for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import pytest

from tests.serving.server_process import ServerProcess

NAMES = ("a", "b", "c", "d")


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    flags = [part for name in NAMES for part in ("--served-model-name", name)]
    with ServerProcess(tmp_path_factory.mktemp("models") / "log.txt", *flags) as server:
        yield server


@pytest.mark.parametrize(("query", "names", "has_more"), [
    ({}, "abcd", False), ({"limit": 3}, "abc", True), ({"limit": 4}, "abcd", False), ({"limit": 1000}, "abcd", False),
    ({"after_id": "b"}, "cd", False), ({"after_id": "a", "limit": 2}, "bc", True), ({"after_id": "d"}, "", False),
    ({"before_id": "c"}, "ab", False), ({"before_id": "d", "limit": 2}, "bc", True), ({"before_id": "a"}, "", False),
])
def test_pages(several: ServerProcess, query: dict[str, Any], names: str, has_more: bool) -> None:
    page = several.http.get("/v1/models", params=query).json()
    assert "".join(card["id"] for card in page["data"]) == names and page["has_more"] == has_more
    assert (page["first_id"], page["last_id"]) == ((names[0], names[-1]) if names else (None, None))


def test_the_client_turns_the_pages(several: ServerProcess) -> None:
    with anthropic.Anthropic(base_url=several.url, api_key="x", max_retries=0) as client:
        assert [model.id for model in client.models.list(limit=1)] == list(NAMES)
        assert [model.id for model in client.models.list(limit=1, before_id="c")] == ["b", "a"]


@pytest.mark.parametrize(("query", "field"), [
    ({"limit": "0"}, "limit"), ({"limit": "1001"}, "limit"), ({"limit": "x"}, "limit"), ({"limit": "-1"}, "limit"),
    ({"limit": "9" * 5000}, "limit"), ({"after_id": "x"}, "after_id"), ({"before_id": "x"}, "before_id"),
    ({"before_id": "a", "after_id": "b"}, "before_id"),
])
def test_what_is_wrong_is_named(several: ServerProcess, query: dict[str, str], field: str) -> None:
    answer = several.http.get("/v1/models", params=query)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == field
