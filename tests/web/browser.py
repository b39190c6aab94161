"""Pages that are watched: what they log, what they ask for, and whether anything moved."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from playwright.sync_api import Browser, BrowserContext, Page, Request, Route, expect, sync_playwright

SIZE = {"width": 1280, "height": 800}
PHONE = {"width": 390, "height": 844}


FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"]


@contextlib.contextmanager
def launched(executable: str) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=executable, args=FLAGS)
        yield opened
        opened.close()


class Watcher:
    """Everything that a page should not do."""

    def __init__(self, page: Page, origin: str):
        self.origin = origin
        self.complaints: list[str] = []
        self.tolerated: str | None = None  # no complaint if this is in it
        self.requests: list[str] = []
        page.on("console", lambda message: self._logged(message.type, message.text))
        page.on("pageerror", lambda error: self.complaints.append(f"exception: {error}"))
        page.on("dialog", lambda dialog: (self.complaints.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("popup", lambda popup: self.complaints.append(f"popup: {popup.url}"))
        page.on("request", self._requested)

    def _logged(self, kind: str, text: str) -> None:
        if kind in ("error", "warning") and (self.tolerated is None or self.tolerated not in text):
            self.complaints.append(f"console {kind}: {text}")

    def _requested(self, request: Request) -> None:
        self.requests.append(request.url)
        parts = urlsplit(request.url)
        if f"{parts.scheme}://{parts.netloc}" != self.origin:
            self.complaints.append(f"external request: {request.url}")


class Tab:
    """Opens watched pages on one server."""

    def __init__(self, browser: Browser, url: str):
        self._browser, self.url = browser, url
        self.watchers: list[Watcher] = []
        self._contexts: list[BrowserContext] = []

    def __call__(self, path: str = "/", *, url: str | None = None, ready: bool = True, **options: Any) -> Page:
        context = self._browser.new_context(**{"viewport": SIZE, **options})
        self._contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        self.watchers.append(Watcher(page, url or self.url))
        page.goto((url or self.url) + path)
        if ready:
            expect(page.locator(".dot.ok")).to_be_visible()
        return page

    def close(self) -> None:
        while self._contexts:
            self._contexts.pop().close()
        complaints = [complaint for watcher in self.watchers for complaint in watcher.complaints]
        assert not complaints, complaints


def ask(page: Page, text: str, *, max_tokens: int | None = None) -> None:
    """Type a message and send it by the keyboard."""
    if max_tokens is not None:
        page.locator("[name=max_tokens]").fill(str(max_tokens))
    page.locator("#prompt").fill(text)
    page.locator("#prompt").press("Enter")


def change_chats(page: Page, **wishes: Any) -> None:
    """Add to what the page asks the server for, from now on."""
    def change(route: Route) -> None:
        route.continue_(post_data={**route.request.post_data_json, **wishes})

    page.unroute("**/v1/chat/completions")
    page.route("**/v1/chat/completions", change)


def never_ending(page: Page) -> None:
    """Let answers run to max_tokens: the little model would end them soon."""
    change_chats(page, ignore_eos=True)


def will_say(page: Page, text: str) -> None:
    """Let the model write just this: the only choice of a structured output."""
    change_chats(page, structured_outputs={"choice": [text]})


def answered(page: Page, number: int = 1) -> None:
    """Wait until so many answers are complete."""
    expect(page.locator(".message.assistant:not(.streaming)")).to_have_count(number, timeout=30_000)
    expect(page.locator("#log")).to_have_attribute("aria-busy", "false")
