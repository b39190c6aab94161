"""The chat view, with the bundled model."""

from __future__ import annotations

import re
from pathlib import Path

from playwright.sync_api import expect

from tests.serving.server_process import ServerProcess, wait_for
from tests.web.browser import Tab, answered, ask, never_ending

# Shifts of what is there, not what is added below; the observer sees those of the page's whole life.
WATCH_SHIFTS = """
() => { window.shifts = [];
  new PerformanceObserver((list) => { for (const e of list.getEntries()) if (!e.hadRecentInput) window.shifts.push(
      [e.value, ...e.sources.map((s) => s.node?.className || s.node?.nodeName || '?')]); })
    .observe({type: 'layout-shift', buffered: false}); }
"""


def test_streams_an_answer_with_its_figures(open_tab: Tab) -> None:
    page = open_tab()
    assert open_tab.watchers[0].requests[0].endswith("/")
    never_ending(page)
    ask(page, "Write a function that reads a file.", max_tokens=500)
    expect(page.locator(".message.streaming .figures")).to_contain_text("token")  # live, before it is complete
    answered(page)
    figures = page.locator(".figures").inner_text()
    assert re.search(r"\d+ tokens · [\d.]+ tokens/s · first after \d+ ms · prompt \d+", figures), figures
    assert page.locator(".body").inner_text().strip()
    assert page.locator(".codeblock code").count() >= 1
    assert page.locator("#announce").inner_text().startswith("Answer complete, ")


def test_the_same_seed_gives_the_same_answer_and_settings_are_sent(open_tab: Tab) -> None:
    page = open_tab()
    bodies = []
    page.on("request", lambda request: bodies.append(request.post_data_json) if request.post_data else None)
    for name, value in (("temperature", "1.3"), ("top_p", "0.9"), ("top_k", "50"), ("seed", "11"),
                        ("max_tokens", "24"), ("system", "Be brief.")):
        page.locator(f"[name={name}]").fill(value)
    ask(page, "Hello")
    answered(page)
    first = page.locator(".body").inner_text()
    with page.expect_request("**/v1/chat/completions"):
        page.get_by_role("button", name="Retry").click()
    answered(page)
    assert page.locator(".body").inner_text() == first
    body = bodies[-1]
    assert {name: body[name] for name in ("temperature", "top_p", "top_k", "seed", "max_tokens")} == {
        "temperature": 1.3, "top_p": 0.9, "top_k": 50, "seed": 11, "max_tokens": 24}
    assert body["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    page.reload()
    expect(page.locator("[name=temperature]")).to_have_value("1.3")


def test_a_conversation_goes_on(open_tab: Tab) -> None:
    page = open_tab()
    bodies = []
    page.on("request", lambda request: bodies.append(request.post_data_json) if request.post_data else None)
    ask(page, "Hello", max_tokens=8)
    answered(page)
    ask(page, "And again")
    answered(page, 2)
    roles = [message["role"] for message in bodies[-1]["messages"]]
    assert roles == ["user", "assistant", "user"]
    shown = page.locator("#log").inner_text()
    page.reload()
    expect(page.locator(".message")).to_have_count(4)
    assert page.locator("#log").inner_text() == shown
    ask(page, "After a reload")
    answered(page, 3)
    assert bodies[-1]["messages"][:3] == bodies[-2]["messages"]
    page.get_by_role("button", name="New chat").click()
    expect(page.locator(".message")).to_have_count(0)
    expect(page.locator("#empty")).to_be_visible()
    page.reload()
    expect(page.locator("#empty")).to_be_visible()


def test_stop_ends_the_request_in_the_engine(open_tab: Tab, server: ServerProcess) -> None:
    page = open_tab()
    never_ending(page)
    for stop in (lambda: page.get_by_role("button", name="Stop").click(), lambda: page.keyboard.press("Escape")):
        aborted = server.value('xllm:request_success_total{engine="0",finished_reason="abort",model_name="demo"}')
        ask(page, "Write everything that you know.", max_tokens=1900)
        expect(page.locator(".message.streaming .body")).not_to_be_empty()
        stop()
        answered(page)
        expect(page.locator(".figures")).to_contain_text("stopped")
        wait_for(lambda: server.gauge("xllm:num_requests_running") == 0, what="an idle engine")
        ended = server.value('xllm:request_success_total{engine="0",finished_reason="abort",model_name="demo"}')
        assert ended == aborted + 1
        page.get_by_role("button", name="New chat").click()


def test_nothing_moves_while_an_answer_streams(open_tab: Tab) -> None:
    page = open_tab()
    ask(page, "Hello", max_tokens=8)
    answered(page)
    page.evaluate(WATCH_SHIFTS)
    composer = page.locator("#composer").bounding_box()
    ask(page, "Write a function that reads a file.", max_tokens=200)
    answered(page, 2)
    assert page.locator("#composer").bounding_box() == composer
    assert sum(shift[0] for shift in page.evaluate("() => window.shifts")) < 0.01, page.evaluate("() => window.shifts")
    end = page.evaluate("() => { const s = document.querySelector('#scroller');"
                        " return s.scrollHeight - s.scrollTop - s.clientHeight; }")
    assert end < 2  # it followed the text


def test_whoever_scrolled_up_is_left_there(open_tab: Tab) -> None:
    page = open_tab(viewport={"width": 1000, "height": 420})
    never_ending(page)
    ask(page, "Write a function that reads a file.", max_tokens=700)
    expect(page.locator(".message.streaming .figures")).to_contain_text("tokens/s")
    wait_for(lambda: page.evaluate("() => { const s = document.querySelector('#scroller');"
                                   " return s.scrollHeight > s.clientHeight + 200; }"), what="a long answer")
    page.evaluate("() => { document.querySelector('#scroller').scrollTop = 0; }")
    answered(page)
    assert page.evaluate("() => document.querySelector('#scroller').scrollTop") == 0


def test_an_error_is_shown_and_the_chat_goes_on(open_tab: Tab) -> None:
    page = open_tab()
    open_tab.watchers[0].tolerated = "400"  # Chromium logs it
    ask(page, "Hello", max_tokens=100_000)
    expect(page.locator(".failure")).to_contain_text("max_tokens is 100000")
    page.locator("[name=max_tokens]").fill("4")
    page.get_by_role("button", name="Retry").click()
    answered(page)
    expect(page.locator(".failure")).to_have_count(0)
    expect(page.locator(".figures")).to_contain_text("4 tokens")


def test_wrong_tools_are_said_before_anything_is_sent(open_tab: Tab) -> None:
    page = open_tab()
    page.locator("[name=tools]").fill("{not json")
    ask(page, "Hello")
    expect(page.locator("#tools-error")).to_contain_text("Tools: ")
    expect(page.locator(".message")).to_have_count(0)
    expect(page.locator("#prompt")).to_have_value("Hello")


def test_one_of_several_models_can_be_chosen(tmp_path: Path, open_tab: Tab) -> None:
    with ServerProcess(tmp_path / "log.txt", "--served-model-name", "first", "--served-model-name", "second") as server:
        page = open_tab(url=server.url)
        bodies = []
        page.on("request", lambda request: bodies.append(request.post_data_json) if request.post_data else None)
        expect(page.get_by_label("Model")).to_have_value("first")
        page.get_by_label("Model").select_option("second")
        ask(page, "Hello", max_tokens=2)
        answered(page)
        assert bodies[-1]["model"] == "second"
        open_tab.close()
