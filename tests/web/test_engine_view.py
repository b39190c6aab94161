"""The engine view follows a real engine under load."""

from __future__ import annotations

import threading
from typing import Any

import httpx
from playwright.sync_api import expect

from tests.serving.server_process import ServerProcess, wait_for
from tests.web.browser import Tab

NUMBER = {"timeout": 15_000}


def start(server: ServerProcess, **body: Any) -> threading.Thread:
    def call() -> None:
        httpx.post(f"{server.url}/v1/completions", timeout=60, json={
            "prompt": [f"def number_{i}(x):" for i in range(6)], "max_tokens": 600, "ignore_eos": True, **body})

    thread = threading.Thread(target=call)
    thread.start()
    return thread


def test_it_follows_the_engine(open_tab: Tab, server: ServerProcess) -> None:
    page = open_tab("/#engine")
    expect(page.locator("#view-chat")).to_be_hidden()
    expect(page.locator("#m-running-of")).to_have_text("of 256", **NUMBER)
    load = start(server)
    expect(page.locator("#m-running")).to_have_text("6", **NUMBER)
    wait_for(lambda: float(page.locator("#m-gen").inner_text().replace(",", "")) > 20, what="a token rate")
    expect(page.locator("td.end.live").first).to_have_text("decode", **NUMBER)
    assert float(page.locator("#m-kv").inner_text()) > 0
    expect(page.locator("#tiers")).to_contain_text("of 1,024 blocks")
    expect(page.locator("#graphs")).to_contain_text("without captured graphs")
    load.join()
    expect(page.locator("#m-running")).to_have_text("0", **NUMBER)
    first = page.locator("#requests tr").first
    expect(first.locator("td.end")).to_have_text("length", **NUMBER)
    assert first.locator("td").nth(4).inner_text() == "600"
    widths = [float(first.locator(f"rect.{name}").get_attribute("width") or 0) for name in ("prefill", "decode")]
    assert 0 < widths[0] < widths[1] <= 1000
    expect(page.locator("#f-steps")).to_contain_text("median")
    assert page.locator("#c-steps .point").count() > 0
    label = page.locator("#s-gen svg").get_attribute("aria-label")
    assert label and label.startswith("Generated tokens per second: now ")


def test_it_begins_with_what_was_before(open_tab: Tab, server: ServerProcess) -> None:
    """The server keeps the last minutes, so a page that is opened after the load still shows it."""
    start(server, max_tokens=100).join()
    page = open_tab("/#engine")
    expect(page.locator("#requests tr")).not_to_have_count(0, **NUMBER)
    assert "highest 0 " not in (page.locator("#s-gen svg").get_attribute("aria-label") or "")


def test_it_listens_only_while_it_can_be_seen(open_tab: Tab) -> None:
    page = open_tab("/")
    asked = open_tab.watchers[0].requests
    assert not any("/v1/stats" in url for url in asked)
    page.get_by_role("link", name="Engine").click()
    expect(page.locator("#m-running-of")).to_have_text("of 256", **NUMBER)
    assert sum("/v1/stats/stream" in url for url in asked) == 1
    page.get_by_role("link", name="Chat").click()
    expect(page.locator("#prompt")).to_be_focused()
