"""Write the pictures of docs/console.md: `python -m tests.web.screenshots docs/images`. Real servers, real models."""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, expect

from tests.serving.cluster_up_process import ClusterUp
from tests.serving.scripted_model import go, write_checkpoint
from tests.serving.server_process import ServerProcess
from tests.web.browser import PHONE, SIZE, Tab, answered, ask, launched
from tests.web.scripts import SCRIPTS, TEMPLATE, TOOLS
from tools.get_browser import find_chromium

MAX_BYTES = 150_000
COLOURS = 256


def save(page: Page, path: Path) -> None:
    """A screenshot with a palette, which makes it a third of the size."""
    page.screenshot(path=path)
    with Image.open(path) as image:
        reduced = image.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    reduced.save(path, optimize=True)
    assert path.stat().st_size < MAX_BYTES, f"{path} has {path.stat().st_size} bytes"
    print(path, path.stat().st_size)


def chat(browser: Browser, server: ServerProcess, path: Path, **options: object) -> None:
    tab = Tab(browser, server.url)
    page = tab(**{"viewport": SIZE, **options})  # type: ignore[arg-type]
    page.locator("[name=seed]").evaluate("(e) => { e.value = 3; e.form.elements.temperature.value = 0.3; }")
    page.locator("[name=max_tokens]").evaluate("(e) => { e.value = 90; }")
    ask(page, "Write a function that reads a file.")
    answered(page)
    save(page, path)
    tab.close()


def tools(browser: Browser, server: ServerProcess, path: Path) -> None:
    tab = Tab(browser, server.url)
    page = tab(color_scheme="dark")
    page.locator("[name=temperature]").fill("0")
    page.locator("[name=tools]").fill(TOOLS)
    ask(page, "What is the weather in Oslo?" + go("agent"))
    answered(page)
    page.locator(".message.user").evaluate("(e) => { e.lastChild.data = 'What is the weather in Oslo?'; }")
    page.locator("#prompt").blur()
    save(page, path)
    tab.close()


def engine(browser: Browser, server: ServerProcess, paths: dict[str, Path]) -> None:
    done = threading.Event()

    def load(count: int, max_tokens: int) -> None:
        prompts = [f"def number_{i}(x):\n    " * (4 + 6 * i) for i in range(count)]
        with server.http.stream("POST", "/v1/completions", json={
                "prompt": prompts, "max_tokens": max_tokens, "ignore_eos": True, "stream": True}) as response:
            for _ in response.iter_lines():
                if done.is_set():
                    return

    tabs = []
    for scheme in paths:
        tab = Tab(browser, server.url)
        size = {"width": 1280, "height": 860} if scheme != "phone" else PHONE
        tabs.append((tab, tab("/#engine", viewport=size, color_scheme="dark" if scheme == "dark" else "light"),
                     paths[scheme]))
    threads = []
    for count, max_tokens in ((3, 500), (6, 300), (2, 900), (5, 350), (4, 700)):
        threads.append(threading.Thread(target=load, args=(count, max_tokens)))
        threads[-1].start()
        time.sleep(2)
    for tab, page, path in tabs:
        expect(page.locator("#m-running")).not_to_have_text("0")
        save(page, path)
        tab.close()
    done.set()
    for thread in threads:
        thread.join()


def cluster(browser: Browser, scratch: Path, path: Path) -> None:
    """Three instances, of which one is killed under load."""
    done = threading.Event()
    parts = [f"def part_{number}(x):\n    return x + {number}\n" * 8 for number in range(5)]

    def load(up: ClusterUp, first: int) -> None:
        number = first
        while not done.is_set():
            up.http.post("/v1/completions", json={"prompt": parts[number % len(parts)] + f"# {number}\n",
                                                  "max_tokens": 60, "ignore_eos": True})
            number += 3

    with ClusterUp(scratch / "cluster.txt", 3) as up:
        tab = Tab(browser, up.url)
        page = tab("/", viewport={"width": 1280, "height": 1020})
        page.get_by_role("link", name="Cluster").click()
        threads = [threading.Thread(target=load, args=(up, first)) for first in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(6)
        up.instances["instance-1"].kill()
        time.sleep(3)
        expect(page.locator("[data-name=instance-1] .of-state")).to_contain_text("suspect")
        save(page, path)
        tab.close()
        done.set()
        for thread in threads:
            thread.join()


def main() -> int:
    folder, chromium = Path(sys.argv[1]), find_chromium()
    assert chromium is not None, "make browser installs one"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, launched(chromium) as browser:
        log = Path(scratch) / "log.txt"
        with ServerProcess(log, "--max-model-len", "2048", "--graph-mode", "checked", "--max-num-seqs", "16",
                           "--host-cache-size", "8MiB") as server:
            server.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 8})  # its graphs are captured
            chat(browser, server, folder / "console-chat-light.png")
            chat(browser, server, folder / "console-chat-dark.png", color_scheme="dark")
            chat(browser, server, folder / "console-phone.png", viewport=PHONE, device_scale_factor=2, is_mobile=True,
                 has_touch=True)
            engine(browser, server, {scheme: folder / f"console-engine-{scheme}.png" for scheme in ("light", "dark")})
        checkpoint = write_checkpoint(Path(scratch) / "scripted", SCRIPTS, TEMPLATE)
        with ServerProcess(log, "--model", str(checkpoint), "--served-model-name", "scripted", "--tool-call-parser",
                           "hermes", "--reasoning-parser", "qwen3") as server:
            tools(browser, server, folder / "console-tools-dark.png")
        cluster(browser, Path(scratch), folder / "console-cluster-light.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
