"""Who can use the console: by keyboard only, on a phone, in the dark, with less motion, with a key."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import Page, expect

from tests.serving.scripted_model import go
from tests.serving.server_process import ServerProcess
from tests.web.browser import PHONE, Tab, answered, ask, never_ending, will_say
from tests.web.scripts import EVERYTHING, TOOLS, WIDE

# Contrast of each visible text with what is behind it, as WCAG 2 counts it; returns those below AA.
TOO_FAINT = """() => {
  const channel = (v) => { v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; };
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const ground = (element) => {
    for (; element; element = element.parentElement) {
      const colour = parse(getComputedStyle(element).backgroundColor);
      if (colour.length < 4 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement;
    if (!node.data.trim() || !element.checkVisibility() || element.closest('.hidden, .who, .skip, :disabled')) continue;
    const style = getComputedStyle(element);
    const front = light(parse(element.closest('svg') ? style.fill : style.color)), back = light(ground(element));
    const ratio = (Math.max(front, back) + 0.05) / (Math.min(front, back) + 0.05);
    const size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    if (ratio < (large ? 3 : 4.5)) found.push([node.data.trim().slice(0, 40), Number(ratio.toFixed(2))]);
  }
  return found;
}"""
# How far the page, or a part that scrolls as a whole, is wider than it shows.
OVERFLOW = """() => Math.max(...[
  ':root', '#scroller', '#view-engine', '#view-cluster', '#settings', '#composer',
].map((name) => {
  const part = document.querySelector(name);
  return part.scrollWidth - part.clientWidth;
}))"""


def focused(page: Page) -> str:
    return str(page.evaluate("() => document.activeElement.id || document.activeElement.name"
                             " || document.activeElement.textContent.trim()"))


def test_keyboard_only(open_tab: Tab) -> None:
    page = open_tab()
    never_ending(page)
    expect(page.locator("#prompt")).to_be_focused()
    page.keyboard.type("first line")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("second line")
    assert page.locator("#prompt").input_value() == "first line\nsecond line"
    page.keyboard.press("Enter")
    expect(page.locator(".message.streaming .body")).not_to_be_empty()
    expect(page.locator("#prompt")).to_be_focused()  # sending takes the focus nowhere
    page.keyboard.press("Escape")
    answered(page)
    assert page.locator(".message.user").inner_text().endswith("first line\nsecond line")
    order = []
    page.evaluate("() => { document.activeElement.blur(); document.querySelector('.skip').focus(); }")
    while order[-1:] != ["Reset to defaults"]:
        order.append(focused(page))
        assert len(order) < 30, order
        outline = page.evaluate("() => getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none", f"{order[-1]} shows no focus"
        page.keyboard.press("Tab")
    wanted = ["Skip to content", "Chat", "Engine", "key-button", "theme-button", "scroller", "Copy", "Retry", "prompt",
              "clear-button", "send-button", "temperature", "top_p", "top_k", "max_tokens", "seed", "system", "tools",
              "Reset to defaults"]
    assert [name for name in order if name in wanted] == wanted


def test_the_key_dialog_by_keyboard(open_tab: Tab) -> None:
    page = open_tab()
    page.locator("#key-button").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#key-input")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.locator("#key-dialog")).not_to_be_visible()
    expect(page.locator("#key-button")).to_be_focused()


def test_names_for_those_who_listen(open_tab: Tab) -> None:
    """Every control has a name, and the log is one that says when it is busy."""
    page = open_tab()
    for control in page.locator("button, input, textarea, a").all():
        if control.is_visible():
            name = control.evaluate("(e) => e.getAttribute('aria-label') || (e.labels?.[0] ?? e).textContent")
            assert name and name.strip(), control.evaluate("(e) => e.outerHTML")
    log = page.get_by_role("log")
    assert log.get_attribute("aria-live") == "polite"
    never_ending(page)
    ask(page, "Hello", max_tokens=300)
    expect(log).to_have_attribute("aria-busy", "true")
    expect(page.locator("#announce")).to_have_text("The model is answering.")
    answered(page)
    expect(page.locator("#announce")).to_have_text("Answer complete, 300 tokens.")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(open_tab: Tab, scripted: ServerProcess, scheme: str) -> None:
    page = open_tab(color_scheme=scheme)
    will_say(page, EVERYTHING)
    ask(page, "Hello")
    answered(page)
    for part in ("h3", "code", "a", "blockquote", ".codeblock", "td", "ol ul"):
        expect(page.locator(f".body {part}").first).to_be_visible()
    assert page.evaluate(TOO_FAINT) == []
    page.get_by_role("link", name="Engine").click()
    expect(page.locator("#m-running-of")).to_have_text("of 256")
    expect(page.locator("#requests tr")).not_to_have_count(0)
    assert page.evaluate(TOO_FAINT) == []
    page = open_tab(url=scripted.url, color_scheme=scheme)
    page.locator("[name=temperature]").fill("0")
    page.locator("[name=tools]").fill(TOOLS)
    ask(page, go("agent"))
    answered(page)
    expect(page.locator(".reasoning")).to_be_visible()
    expect(page.locator(".call").first).to_be_visible()
    assert page.evaluate(TOO_FAINT) == []


def test_theme_follows_the_system_and_the_button(open_tab: Tab) -> None:
    def ground(page: Page) -> str:
        return str(page.evaluate("() => getComputedStyle(document.body).backgroundColor"))

    light, dark = open_tab(color_scheme="light"), open_tab(color_scheme="dark")
    light_ground, dark_ground = ground(light), ground(dark)
    assert light_ground != dark_ground
    for theme, colour in (("light", light_ground), ("dark", dark_ground), ("system", dark_ground)):
        dark.locator("#theme-button").click()
        assert (dark.locator("#theme-label").inner_text(), ground(dark)) == (f"Theme: {theme}", colour)
    light.locator("#theme-button").click()
    light.locator("#theme-button").click()
    light.reload()
    assert ground(light) == dark_ground  # it is remembered


def test_phone(open_tab: Tab) -> None:
    page = open_tab(viewport=PHONE, has_touch=True, is_mobile=True, device_scale_factor=2)
    assert page.evaluate(OVERFLOW) == 0
    will_say(page, WIDE)
    ask(page, "y" * 200)
    answered(page)
    expect(page.locator(".body")).to_contain_text("end")
    assert page.evaluate(OVERFLOW) == 0
    expect(page.locator("#settings")).not_to_be_visible()
    page.get_by_role("button", name="Settings").tap()
    expect(page.locator("[name=temperature]")).to_be_focused()
    assert page.evaluate(OVERFLOW) == 0
    page.keyboard.press("Escape")
    expect(page.locator("#settings")).not_to_be_visible()
    expect(page.locator("#settings-button")).to_be_focused()
    page.get_by_role("link", name="Engine").tap()
    expect(page.locator("#m-running-of")).to_have_text("of 256")
    assert page.evaluate(OVERFLOW) == 0
    for button in page.locator("header button:visible, header a:visible").all():
        box = button.bounding_box()
        assert box and box["height"] >= 32 and box["width"] >= 32


def test_less_motion(open_tab: Tab) -> None:
    moving = "() => document.getAnimations().length"
    page = open_tab(reduced_motion="reduce")
    never_ending(page)
    ask(page, "Hello", max_tokens=300)
    expect(page.locator(".message.streaming .body")).not_to_be_empty()
    assert page.evaluate(moving) == 0
    answered(page)


def test_a_server_with_keys(keyed_server: ServerProcess, open_tab: Tab) -> None:
    page = open_tab(url=keyed_server.url, ready=False)
    watcher = open_tab.watchers[-1]
    watcher.tolerated = "401"  # Chromium logs each of them
    expect(page.locator("#notice")).to_have_text("This server needs an API key.")
    for key, notice in (("wrong", "The server does not know this API key."), ("open sesame", "")):
        page.locator("#key-button").click()
        page.locator("#key-input").fill(key)
        page.keyboard.press("Enter")
        expect(page.locator("#notice")).to_have_text(notice)
    expect(page.locator(".dot.ok")).to_be_visible()
    ask(page, "Hello", max_tokens=4)
    answered(page)
    expect(page.locator(".figures")).to_contain_text("4 tokens")
    page.get_by_role("link", name="Engine").click()
    expect(page.locator("#m-running-of")).to_have_text("of 256")
    stored = page.evaluate("() => [JSON.stringify(localStorage), JSON.stringify(sessionStorage), document.cookie]")
    assert "open sesame" not in stored[0] + stored[2] and "open sesame" in stored[1]
    assert not any(re.search("open|sesame", url) for url in watcher.requests)
    page.locator("#key-button").click()
    page.get_by_role("button", name="Forget").click()
    expect(page.locator("#notice")).to_have_text("This server needs an API key.")
    assert "open sesame" not in page.evaluate("() => JSON.stringify(sessionStorage)")


def test_reasoning_and_tool_calls(open_tab: Tab, scripted: ServerProcess) -> None:
    """What the model calls is shown; the results that are typed in go back to it, and it goes on."""
    page = open_tab(url=scripted.url)
    bodies = []
    page.on("request", lambda request: bodies.append(request.post_data_json) if request.post_data else None)
    page.locator("[name=temperature]").fill("0")
    page.locator("[name=tools]").fill(TOOLS)
    ask(page, go("agent"))
    answered(page)
    assert page.locator(".reasoning .text").inner_text().strip() == "I should look it up."
    assert page.locator(".body").inner_text().strip() == "One moment."
    assert page.locator(".call b").all_inner_texts() == ["weather", "time"]
    assert '"city": "Oslo"' in page.locator(".call pre").first.inner_text()
    page.get_by_label("Result of weather").fill("rain")
    page.keyboard.press("Enter")
    page.get_by_label("Result of time").fill(go("after"))
    page.keyboard.press("Enter")
    answered(page, 2)
    assert page.locator(".body").last.inner_text() == "It rains."
    sent = bodies[-1]["messages"]
    assert [message["role"] for message in sent] == ["user", "assistant", "tool", "tool"]
    assert [call["function"]["name"] for call in sent[1]["tool_calls"]] == ["weather", "time"]
    assert [message["tool_call_id"] for message in sent[2:]] == [call["id"] for call in sent[1]["tool_calls"]]
    assert sent[2]["content"] == "rain"
    page.reload()
    expect(page.locator(".message")).to_have_count(3)
    assert page.locator(".reasoning .text").first.text_content().strip() == "I should look it up."
    assert page.locator(".call b").all_inner_texts() == ["weather", "time"]
    expect(page.locator(".call input").first).to_have_value("rain")
    assert page.locator(".body").last.inner_text() == "It rains."
