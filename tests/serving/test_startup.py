"""What a start looks like: in a log, and on a real terminal."""

from __future__ import annotations

import io
import os
import pty
import re
import signal
import subprocess
import sys

from serving.commands.startup import StartupView
from tests.serving.server_process import ROOT, ServerProcess

PHASE_TIMES = re.compile(
    r"ready after [\d.]+ s \(import [\d.]+ s, weights [\d.]+ s, (?:[\w-]+ [\d.]+ s, )*tokenizer [\d.]+ s\)")


def test_a_log_has_a_line_for_each_phase(server: ServerProcess) -> None:
    lines = server.log.splitlines()
    begun = [line.split()[-1] for line in lines if re.search(r" INFO api xllm.startup: \[ *[\d.]+ s\] [\w-]+$", line)]
    assert [begun[0], begun[1], begun[-1]] == ["import", "weights", "tokenizer"]
    assert any(PHASE_TIMES.search(line) for line in lines), server.log
    assert f"console: {server.url}/" in lines
    assert any(re.fullmatch(r"device cpu, num_threads \d+; dtype float32, quantization none; weights 25 MiB, "
                            r"KV cache up to 96 MiB in float32, \d+ bytes a token", line) for line in lines), server.log
    assert sum(line.startswith("hint: --quantization w8a8") for line in lines) == 1
    assert "\x1b" not in server.log and "\r" not in server.log


def test_a_terminal_sees_phases_with_times() -> None:
    main, child = pty.openpty()
    process = subprocess.Popen([sys.executable, "-m", "serving.commands.cli", "serve", "--port", "0", "--max-model-len",
                                "128", "--num-kv-blocks", "64"], cwd=ROOT, stdin=child, stdout=child, stderr=child)
    os.close(child)
    text = b""
    while b"curl" not in text:
        text += os.read(main, 4096)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    os.close(main)
    shown = text.decode()
    for phase in ("import", "weights", "tokenizer"):
        assert re.search(rf"\r\x1b\[K{phase} +[\d.]+ s\r\n", shown), shown
    assert PHASE_TIMES.search(shown)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_fills_and_is_drawn_at_most_so_often() -> None:
    now = 0.0
    out = Terminal()
    view = StartupView(out, clock=lambda: now)
    view.phase("weights", 0.0)
    for step in range(1, 1001):
        now = step * 0.001
        view.phase("weights", step / 1000)
    drawn = re.findall(r"(█*)░* +(\d+)%", out.getvalue())
    assert 15 <= len(drawn) <= 20  # every 50 ms
    assert [len(full) for full, _ in drawn] == sorted(len(full) for full, _ in drawn)
    assert all(abs(len(full) - 30 * int(percent) / 100) <= 1 for full, percent in drawn)
    view.ready()
    assert out.getvalue().endswith("\r\x1b[Kweights         1.00 s\nready after 1.00 s (weights 1.00 s)\n")


def test_a_log_of_a_long_load_says_how_far_it_is() -> None:
    now = 0.0
    out = io.StringIO()
    view = StartupView(out, clock=lambda: now)
    for step in range(61):
        now = step * 0.25
        view.phase("weights", step / 60)
    assert out.getvalue().splitlines() == ["[  0.00 s] weights", "[  5.00 s] weights 33%", "[ 10.00 s] weights 67%",
                                           "[ 15.00 s] weights 100%"]


def test_an_error_starts_on_a_line_of_its_own() -> None:
    out = Terminal()
    view = StartupView(out)
    view.phase("weights", 0.0)
    view.interrupt()
    view.interrupt()
    assert out.getvalue().endswith("s\n") and out.getvalue().count("\n") == 1


def test_another_start_is_counted_from_its_own_beginning() -> None:
    now = 0.0
    out = io.StringIO()
    view = StartupView(out, clock=lambda: now)
    view.phase("import", 0.0)
    now = 2.0
    view.ready()
    view.ready()
    now = 100.0
    view.phase("import", 0.0)
    now = 101.0
    view.ready()
    assert out.getvalue().splitlines() == ["[  0.00 s] import", "ready after 2.00 s (import 2.00 s)",
                                           "[  0.00 s] import", "ready after 1.00 s (import 1.00 s)"]
