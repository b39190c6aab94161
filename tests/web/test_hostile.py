"""What a model or a user writes is text."""

from __future__ import annotations

import pytest
from playwright.sync_api import expect

from tests.serving.scripted_model import go
from tests.serving.server_process import ServerProcess
from tests.web.browser import Tab, answered, ask, will_say
from tests.web.scripts import ATTACKS, EVIL, TOOLS

FORBIDDEN = "script, img, iframe, object, embed, svg, style, base, meta, link, [onclick], [onerror], [onload], [srcdoc]"


def test_output_is_inert(open_tab: Tab) -> None:
    page = open_tab()
    for attack in ATTACKS:
        will_say(page, attack)
        ask(page, "Hello")
        answered(page)
        body = page.locator(".message.assistant .body")
        assert body.inner_text().strip(), attack
        assert body.locator(FORBIDDEN).count() == 0, attack
        for link in body.locator("a").all():
            assert (link.get_attribute("href") or "").startswith("https://"), attack
            assert link.get_attribute("rel") == "noopener noreferrer nofollow"
        if attack.startswith("<"):
            assert attack in body.inner_text()
        page.get_by_role("button", name="New chat").click()


def test_a_prompt_is_inert(open_tab: Tab) -> None:
    page = open_tab()
    for attack in ATTACKS[:3]:
        ask(page, attack, max_tokens=4)
        answered(page)
        sent = page.locator(".message.user")
        assert attack in sent.inner_text()
        assert sent.locator("*:not(.who)").count() == 0
        page.get_by_role("button", name="New chat").click()


def test_reasoning_and_arguments_of_tools_are_inert(open_tab: Tab, scripted: ServerProcess) -> None:
    page = open_tab(url=scripted.url)
    page.locator("[name=temperature]").fill("0")
    page.locator("[name=tools]").fill(TOOLS)
    ask(page, go("evil"))
    answered(page)
    expect(page.locator(".call b")).to_have_text("weather")
    assert page.locator(".message.assistant").locator("img, script").count() == 0
    assert EVIL in page.locator(".call pre").inner_text()
    assert EVIL in page.locator(".reasoning .text").inner_text()


@pytest.mark.parametrize("text", ["[" * 40_000, "**a" * 20_000, "`" * 30_001, "> " * 20_000, "|" * 30_000,
                                  "- a\n  " * 8_000, "[a](" * 10_000, "~~~" * 9_000])
def test_long_nonsense_is_drawn_in_linear_time(open_tab: Tab, text: str) -> None:
    page = open_tab()
    ms = page.evaluate("""async (text) => {
        const {render} = await import('/web/markdown.js');
        const root = document.createElement('div');
        const started = performance.now();
        render(root, text);
        return performance.now() - started;
    }""", text)
    assert ms < 1500


def test_headers(server: ServerProcess) -> None:
    for path in ("/", "/web/app.js", "/web/style.css"):
        response = server.http.get(path)
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "require-trusted-types-for" in policy
        assert "frame-ancestors 'none'" in policy
        assert response.headers["x-content-type-options"] == "nosniff"
        assert server.http.get(path, headers={"If-None-Match": response.headers["etag"]}).status_code == 304
        assert server.http.head(path).status_code == 200
    for path in ("/web/", "/web/..%2fstate.py", "/web/%2e%2e/state.py", "/web/nothing.js", "/web/index.html/x"):
        assert server.http.get(path).status_code in (404, 405), path
    assert server.http.post("/").status_code == 405
