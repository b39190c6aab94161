"""Pages that are watched: what they log, what they ask for, and whether anything moved."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from playwright.sync_api import Browser, BrowserContext, Page, Request, Route, expect

SIZE = {"width": 1280, "height": 800}
PHONE = {"width": 390, "height": 844}


class Watcher:
    """Everything that a page should not do."""

    def __init__(self, page: Page, origin: str):
        self.origin = origin
        self.complaints: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda message: self._logged(message.type, message.text))
        page.on("pageerror", lambda error: self.complaints.append(f"exception: {error}"))
        page.on("dialog", lambda dialog: (self.complaints.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("popup", lambda popup: self.complaints.append(f"popup: {popup.url}"))
        page.on("request", self._requested)

    def _logged(self, kind: str, text: str) -> None:
        if kind in ("error", "warning"):
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
        for context in self._contexts:
            context.close()
        complaints = [complaint for watcher in self.watchers for complaint in watcher.complaints]
        assert complaints == []


def ask(page: Page, text: str, *, max_tokens: int | None = None) -> None:
    """Type a message and send it by the keyboard."""
    if max_tokens is not None:
        page.locator("[name=max_tokens]").fill(str(max_tokens))
    page.locator("#prompt").fill(text)
    page.locator("#prompt").press("Enter")


def never_ending(page: Page) -> None:
    """Let the page's chats run to max_tokens: the little model would end them soon."""
    def lengthen(route: Route) -> None:
        route.continue_(post_data={**route.request.post_data_json, "ignore_eos": True})

    page.route("**/v1/chat/completions", lengthen)


def answered(page: Page, number: int = 1) -> None:
    """Wait until so many answers are complete."""
    expect(page.locator(".message.assistant:not(.streaming)")).to_have_count(number, timeout=30_000)
    expect(page.locator("#log")).to_have_attribute("aria-busy", "false")
