"""Every member of a request body is honoured, refused by name, or harmless for a reason, as docs/members.md says."""

from __future__ import annotations

import re

import pytest

from serving.api.types import NOT_BUILT
from tests.members.bodies import BODIES
from tests.members.table import Member, faults_of, read_tables
from tests.members.values import body_with
from tests.serving.server_process import ServerProcess

TABLES = read_tables("members.md")
EFFECTS = "tests/members/test_effects.py::"


def rows_of(handling: str) -> list[tuple[str, str]]:
    return [(title, member.path) for title in BODIES for member in TABLES[title].values()
            if member.handling == handling]


def test_there_is_a_table_for_each_body() -> None:
    assert list(TABLES) == list(BODIES)


@pytest.mark.parametrize("title", BODIES)
def test_every_member_has_a_row(title: str) -> None:
    stops = {member.path for member in TABLES[title].values() if member.handling != "honoured"}
    assert sorted(BODIES[title].declared(stops).keys() - TABLES[title].keys()) == []


@pytest.mark.parametrize("title", BODIES)
def test_every_row_is_of_a_member(title: str) -> None:
    body = BODIES[title]
    known = body.members.keys() | body.own.harmless | NOT_BUILT.keys()
    assert sorted(TABLES[title].keys() - known) == []


@pytest.mark.parametrize("title", BODIES)
def test_every_row_has_its_test_or_its_reason(title: str) -> None:
    assert [fault for member in TABLES[title].values() for fault in faults_of(member)] == []


@pytest.mark.parametrize("title", BODIES)
def test_what_changes_the_answer_is_measured(title: str) -> None:
    """A row that names the test of effects has a case there: its own, or that of the member around it."""
    body = BODIES[title]
    unproved = [member.path for member in TABLES[title].values() if EFFECTS in member.how
                and not any(member.path == path or re.match(re.escape(path) + r"[.(\[]", member.path)
                            for path in body.effects)]
    assert unproved == []


@pytest.mark.parametrize(("title", "path"), rows_of("refused"))
def test_refused_by_name(showing: ServerProcess, title: str, path: str) -> None:
    body, known = BODIES[title], BODIES[title].members
    sent = body_with(known[path], known, body.made)
    answer = showing.http.post(body.path, json=sent)
    assert answer.status_code == 400, f"{sent}: {answer.text}"
    assert names(path, answer.json()["error"]["message"]), answer.text


def names(path: str, message: str) -> bool:
    """Whether a message names the member, or for a variant what holds it and the variant or its label."""
    if found := re.search(r"(\w+)[\[(](\w+)=(\w+)[\])]$", path):
        return found[1] in message and (found[2] in message or found[3] in message)
    return path.rpartition(".")[2].rstrip("[]()") in message


@pytest.mark.parametrize(("title", "path"), rows_of("harmless"))
def test_harmless_is_accepted(showing: ServerProcess, title: str, path: str) -> None:
    body, known = BODIES[title], BODIES[title].members
    sent = body_with(known[path], known, body.made)
    answer = showing.http.post(body.path, json=sent)
    assert answer.status_code == 200, f"{sent}: {answer.text}"


@pytest.mark.parametrize("title", BODIES)
def test_another_model_is_not_there(showing: ServerProcess, title: str) -> None:
    body = BODIES[title]
    found = [showing.http.post(body.path, json={**body.made.base, "model": name}) for name in ("showing", "another")]
    assert [answer.status_code for answer in found] == [200, 404], found[0].text
    assert "another" in found[1].json()["error"]["message"]


@pytest.mark.parametrize("fault", [Member("a", "honoured", "see elsewhere"), Member("a", "harmless", "why"),
                                   Member("a", "honoured", "`tests/members/test_requests.py::test_of_nothing`")])
def test_a_row_without_proof_is_found(fault: Member) -> None:
    assert faults_of(fault)
