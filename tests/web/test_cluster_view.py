"""The cluster view of a master: who is there, where requests went and why, what has happened."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, expect

from tests.web.browser import PHONE, Tab
from tests.web.cluster_app import ClusterApp
from tests.web.test_reach import OVERFLOW, TOO_FAINT

PROMPT = tuple(range(5, 165))


@pytest.fixture
def app() -> Iterator[ClusterApp]:
    with ClusterApp() as running:
        yield running


def test_a_masters_cluster(app: ClusterApp, browser: Browser) -> None:
    tab = Tab(browser, app.url)
    page = tab("/")
    page.get_by_role("link", name="Cluster").click()
    rows = page.locator("#members tr")
    expect(rows).to_have_count(2)
    expect(rows.first.locator("td").first).to_have_text("alpha")
    expect(rows.first.locator(".of-state")).to_have_text("active")
    expect(page.locator("#decisions-empty")).to_be_visible()
    expect(page.locator("#events li")).to_have_count(2)
    expect(page.locator("#f-cluster")).to_have_text("policy CAR · the store: up")

    for number in range(2):
        app.ask(f"number {number}", PROMPT)
    decisions = page.locator("#decisions tr")
    expect(decisions).to_have_count(2)
    newest = decisions.first.locator("td").all_inner_texts()
    assert newest[1:5] == ["160", "160", "alpha", "has the most of the prompt cached"], newest
    assert decisions.first.locator(".scores .chosen").inner_text().startswith("alpha ")
    assert decisions.first.locator(".scores span").count() == 2
    assert decisions.last.locator(".why").inner_text() == "its turn among equals"
    expect(rows.first.locator(".hits")).to_have_text("49.7 %")

    killed = app.kill_one("it was hit <b>hard</b>")
    expect(page.locator(f"[data-name={killed}] .of-state")).to_have_text(
        "suspect its engine stopped: it was hit <b>hard</b>")
    expect(page.locator("#k-active")).to_have_text("1")
    expect(page.locator("#k-recovered")).to_have_text("1")
    events = page.locator("#events li")
    expect(events).to_have_count(4)
    told = [text.partition(f"{killed} ")[2] for text in events.all_inner_texts()[:2]]
    assert told[1].startswith("has left: its engine stopped: it was hit <b>hard</b>")
    assert told[0].endswith(": 1 request goes on elsewhere")
    expect(decisions.first.locator(".why")).to_contain_text("(the 2nd instance that has it)")

    assert page.evaluate(TOO_FAINT) == []
    page.set_viewport_size(PHONE)  # type: ignore[arg-type]
    assert page.evaluate(OVERFLOW) == 0
    asked = tab.watchers[0].requests
    page.get_by_role("link", name="Chat").click()
    num_asked = sum(url.endswith("/cluster") for url in asked)
    page.wait_for_timeout(1200)
    assert sum(url.endswith("/cluster") for url in asked) == num_asked, "it asks only while it can be seen"
    page = tab("/#cluster", ready=False)
    expect(page.locator("#members tr")).to_have_count(2)
    tab.close()


def test_other_servers_have_no_such_view(open_tab: Tab) -> None:
    page = open_tab("/#cluster")
    expect(page.locator("#prompt")).to_be_focused()
    assert page.locator("[data-view=cluster]").is_hidden()
    assert not any(url.endswith("/cluster") for url in open_tab.watchers[0].requests)
