"""`xllm top` in front of a real server, on a real terminal."""

from __future__ import annotations

import argparse
import fcntl
import io
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time

import pytest
from rich.console import Console

from serving.commands import top
from serving.commands.top import LANE_CHARS, bar, lane, phases_of, sparkline
from tests.serving.server_process import ROOT, ServerProcess
from xllm.errors import ConfigError, EngineDeadError

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def flags(at: str, **others: object) -> argparse.Namespace:
    return argparse.Namespace(**{"url": at, "api_key": None, "interval": 0.2, "once": True, **others})


def look(server: ServerProcess, **others: object) -> str:
    out = io.StringIO()
    assert top.run(flags(server.url, **others), Console(file=out, width=110, height=40)) == 0
    return out.getvalue()


def test_one_look(server: ServerProcess) -> None:
    server.http.post("/v1/completions", json={"prompt": ["a", "b c"], "max_tokens": 20, "ignore_eos": True})
    server.wait_idle()  # the stats come with the heartbeat
    text = look(server)
    assert f"xLLM demo  ok  {server.url}" in text
    assert re.search(r"running +0 +of 256", text)
    assert re.search(r"KV device +░+ +0\.0% +0 of 1,024 blocks", text)
    assert re.search(r"threads +\d+ +of \d+", text)
    row = next(line for line in text.splitlines() if "completion" in line)
    assert re.search(r"completion +\d+ +0 +20 +█+ +[\d,]+ +[\d,.]+ +length", row), row
    for _ in range(2):
        server.http.post("/v1/completions", json={"prompt": "a prompt that comes twice " * 20, "max_tokens": 1})
    server.wait_idle()
    assert re.search(r"found in +L2 [\d,]+ tokens", look(server))


@pytest.mark.parametrize(("width", "left_out"), [(110, set()), (80, set()), (75, {"time"}), (66, {"time", "kind"})])
def test_a_narrow_terminal_shows_how_requests_ended(server: ServerProcess, width: int, left_out: set[str]) -> None:
    server.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 20, "ignore_eos": True})
    server.wait_idle()
    out = io.StringIO()
    top.run(flags(server.url), Console(file=out, width=width, height=40))
    lines = out.getvalue().splitlines()
    assert max(len(line) for line in lines) <= width
    head = next(line for line in lines if "output" in line)
    assert set(top.COLUMNS) - set(head.split()) == left_out
    row = next(line for line in lines if re.search(r" 20 .*length", line))
    assert re.search(r" 20 +█* *[\d,]+ +[\d,.]+ +length", row), row


def test_live_on_a_terminal(server: ServerProcess) -> None:
    """It draws on the alternate screen, shows the load, and Ctrl-C gives the terminal back."""
    main, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 110, 0, 0))
    process = subprocess.Popen([sys.executable, "-m", "serving.commands.cli", "top", "--url", server.url, "--interval",
                                "0.2"],
                               cwd=ROOT, stdin=child, stdout=child, stderr=child,
                               env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "110", "LINES": "40"})
    os.close(child)
    text = read_until(main, r"xLLM demo")
    assert "\x1b[?1049h" in text
    load = threading.Thread(target=server.http.post, args=("/v1/completions",), kwargs={"json": {
        "prompt": ["def f():", "def g():"], "n": 3, "max_tokens": 400, "ignore_eos": True}})
    load.start()
    text = read_until(main, r"running +6 +of 256", r"completion .* decode")
    load.join()
    read_until(main, r"running +0 +of 256")
    process.send_signal(signal.SIGINT)
    text = read_until(main, None)
    assert process.wait(10) == 130
    os.close(main)
    assert "\x1b[?1049l" in text and "Traceback" not in text


def read_until(terminal: int, *patterns: str | None, timeout_s: float = 20.0) -> str:
    """What was written until all patterns were seen, or (None) until the end."""
    text, deadline = "", time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            piece = os.read(terminal, 65536)
        except OSError:  # the other end is closed
            return text
        text += piece.decode(errors="replace")
        if all(pattern is not None and re.search(pattern, ESCAPE.sub("", text)) for pattern in patterns):
            return text
    raise AssertionError(f"{patterns} did not appear in {text[-3000:]!r}")


def test_an_interval_may_be_longer_than_the_patience(server: ServerProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(top, "TIMEOUT_S", 0.7)
    snapshots = top.follow(server.url, None, 1000)
    first, second = next(snapshots), next(snapshots)
    assert second["history"]["rows"][-1][0] >= first["history"]["rows"][-1][0] + 0.9
    snapshots.close()


def test_it_says_what_is_wrong(server: ServerProcess) -> None:
    with pytest.raises(ConfigError, match="answered 404"):
        look(server, url=server.url + "/nowhere")
    with pytest.raises(ConfigError, match="interval must be"):
        look(server, interval=0.0)
    with pytest.raises(EngineDeadError, match="no answer from"):
        top.run(flags("http://127.0.0.1:9"))
    with pytest.raises(ConfigError, match="url"):
        top.run(flags("nonsense"))


def test_parts() -> None:
    assert sparkline([0.0, 4.0, 8.0]) == "▁▄█"
    assert sparkline([0.0, 0.0]) == "▁▁"
    assert len(sparkline([1.0] * 500)) == 40
    assert bar(0.5).count("█") == bar(0.5).count("░")
    assert bar(7.0).count("░") == 0
    request = {"arrival_s": 1.0, "scheduled_s": 2.0, "first_token_s": 4.0, "end_s": 8.0}
    assert phases_of(request, 100.0) == (1.0, 2.0, 4.0)
    assert phases_of({**request, "first_token_s": None, "end_s": None}, 5.0) == (1.0, 3.0, 0.0)
    assert phases_of({**request, "scheduled_s": None, "first_token_s": None, "end_s": None}, 5.0) == (4.0, 0.0, 0.0)
    assert len(lane((1.0, 2.0, 4.0), 7.0).plain) == LANE_CHARS
    assert len(lane((1.0, 2.0, 4.0), 14.0).plain) == LANE_CHARS // 2
