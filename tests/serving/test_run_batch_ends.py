"""A batch that is interrupted, at any moment and at any byte; two of them on one file: every request has one answer."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from serving.commands import run_batch
from serving.commands.cli import main
from serving.commands.output_file import open_locked
from tests.serving.server_process import ROOT, ServerProcess, wait_for
from tests.serving.test_run_batch import answers, command, line
from xllm.errors import ConfigError

GREEDY = {"max_tokens": 1, "temperature": 0}
NOBODY = ("--url", "http://127.0.0.1:9")


def batch(folder: Path, *lines: str) -> tuple[Path, Path]:
    source, output = folder / "in.jsonl", folder / "out.jsonl"
    source.write_text("\n".join(lines))
    return source, output


def resume(source: Path, output: Path, *flags: str) -> int:
    return main(["run-batch", "-i", str(source), "-o", str(output), *flags])


def num_lines(output: Path) -> int:
    return output.read_bytes().count(b"\n") if output.exists() else 0


def test_ended_by_signals_at_random_moments(server: ServerProcess, tmp_path: Path) -> None:
    rng = random.Random(7)
    source, output = batch(tmp_path, *(line(f"r{i}", prompt=f"x = {i}", max_tokens=12, ignore_eos=True)
                                       for i in range(120)))
    flags = ("--url", server.url, "--concurrency", "4")
    kept: set[bytes] = set()
    for signum in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        process = subprocess.Popen(command(source, output, *flags), cwd=ROOT, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        begun = num_lines(output)
        while num_lines(output) == begun and process.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.random() * 0.1)
        process.send_signal(signum)
        assert process.wait(30) in (-signum, 128 + signum)
        lines = output.read_bytes().split(b"\n")[:-1]
        assert kept <= set(lines), "what was there stays as it was"
        kept = set(lines)
    assert 3 <= len(kept) < 120
    assert resume(source, output, "--url", server.url) == 0
    assert kept <= set(output.read_bytes().splitlines())
    assert set(answers(output)) == {f"r{i}" for i in range(120)}


def test_cut_anywhere_in_its_last_line(tmp_path: Path) -> None:
    """Lines that cannot be sent are answered without a server. Every byte near the ends has its turn, and those of the
    name, which are not all ASCII; of the rest each eleventh."""
    source, output = batch(tmp_path, *(json.dumps({"custom_id": f"e{i}\x85\u2028é", "url": "/no", "body": {}})
                                       for i in range(2)))
    assert resume(source, output, *NOBODY) == 1
    whole = output.read_bytes()
    first, last = whole.index(b"\n") + 1, len(whole)
    name = whole.index(b"custom_id", first)
    near = {*range(first, first + 6), *range(name, name + 40), *range(last - 6, last + 1)}
    for cut in sorted(near | {*range(first, last, 11)}):
        output.write_bytes(whole[:cut])
        assert resume(source, output, *NOBODY) == 1
        assert _without_ids(output.read_bytes()) == _without_ids(whole), cut


def _without_ids(lines: bytes) -> list[dict[str, object]]:
    """Answers but for the ids that each attempt gives them."""
    return [{**json.loads(text), "id": ""} for text in lines.splitlines()]


def test_real_answers_that_were_cut(server: ServerProcess, tmp_path: Path) -> None:
    source, output = batch(tmp_path, *(line(f"r{i}", prompt=f"x = {i}", **GREEDY) for i in range(3)))
    flags = ("--url", server.url, "--concurrency", "1")
    assert resume(source, output, *flags) == 0
    whole, texts = output.read_bytes(), _texts(output)
    first = whole.index(b"\n") + 1
    for cut in (*range(first, len(whole), 97), len(whole) - 1):
        output.write_bytes(whole[:cut])
        assert resume(source, output, *flags) == 0
        assert _texts(output) == texts, cut


def _texts(output: Path) -> dict[str, str]:
    return {name: entry["response"]["body"]["choices"][0]["text"] for name, entry in answers(output).items()}


# --- two at a time


def test_the_second_run_on_a_file_is_refused(server: ServerProcess, tmp_path: Path,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    source, output = batch(tmp_path, *(line(f"r{i}", prompt=f"x = {i}", max_tokens=40, ignore_eos=True)
                                       for i in range(40)))
    flags = ("--url", server.url, "--concurrency", "1")
    process = subprocess.Popen(command(source, output, *flags), cwd=ROOT, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    wait_for(lambda: num_lines(output) > 0, 60.0, "an answer")
    process.send_signal(signal.SIGSTOP)  # so that it is there for all that follows
    try:
        before = output.read_bytes()
        (tmp_path / "link").symlink_to(output)
        os.link(output, tmp_path / "hard")
        for name in ("out.jsonl", "link", "hard"):
            for more in ((), ("--no-resume",)):
                assert resume(source, tmp_path / name, *flags, *more) == 1
                assert f"another process is writing to {tmp_path / name}" in capsys.readouterr().err
        assert output.read_bytes() == before
    finally:
        process.send_signal(signal.SIGCONT)
    process.kill()
    process.wait()
    assert resume(source, output, "--url", server.url) == 0, "the lock went with the process"
    assert len(answers(output)) == 40


def test_a_file_is_locked_for_as_long_as_it_is_open(tmp_path: Path) -> None:
    with open_locked(tmp_path / "out") as file:
        file.write(b"x")
        with pytest.raises(ConfigError, match="another process"), open_locked(tmp_path / "out"):
            pass
    with open_locked(tmp_path / "out") as file:
        file.write(b"y")
    assert (tmp_path / "out").read_bytes() == b"xy"


# --- the server that it started


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_its_own_server_ends_with_it(tmp_path: Path, signum: signal.Signals) -> None:
    source, output = batch(tmp_path, *(line(f"r{i}", prompt="x", max_tokens=40, ignore_eos=True) for i in range(200)))
    process = subprocess.Popen(
        command(source, output, "--concurrency", "1", "--", "--max-model-len", "64", "--num-kv-blocks", "32"), cwd=ROOT,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: num_lines(output) > 0, 90.0, "an answer")
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 2, "a server and its engine"
    process.send_signal(signum)
    assert process.wait(30) in (-signum, 128 + signum)
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive
    assert len(answers(output)) == num_lines(output) < 200


# --- what else ends a run


@contextlib.contextmanager
def odd_server(reply: Callable[[bytes], bytes]) -> Iterator[str]:
    """A server that says what `reply` makes of a request, and nothing where that is empty."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    peer, _ = listener.accept()
                    with peer:
                        request = b""
                        while not request.endswith(b"}"):
                            request += peer.recv(65536)
                        peer.sendall(reply(request))

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(10)


def test_a_line_that_finds_no_server_is_not_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(run_batch, "RETRIES", 0)
    source, output = batch(tmp_path, *(line(f"r{i}", prompt="bad" if i == 1 else "good") for i in range(50)))
    said = b'HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}'
    with odd_server(lambda request: b"" if b"bad" in request else said) as url:
        assert resume(source, output, "--url", url, "--concurrency", "1") == 1
        assert "cannot be reached" in capsys.readouterr().err
        assert list(answers(output)) == ["r0"], "and the rest of the file is not sent to nobody"
    with odd_server(lambda request: said) as url:
        assert resume(source, output, "--url", url) == 0
    assert len(answers(output)) == 50


def test_texts_and_numbers_that_json_has_and_others_have_not(server: ServerProcess, tmp_path: Path) -> None:
    lines = ['{"custom_id": "half \\ud800", "url": "/v1/completions", "body": {"prompt": "x", "max_tokens": 1}}',
             '{"custom_id": "in it", "url": "/v1/completions", "body": {"prompt": "\\udc00", "max_tokens": 1}}',
             '{"custom_id": "nan", "url": "/v1/completions", "body": {"prompt": "x", "temperature": NaN}}',
             '{"custom_id": "deep", "url": "/v1/completions", "body": {"prompt": ' + "[" * 5000 + "]" * 5000 + "}}",
             line("good", prompt="x", **GREEDY)]
    source, output = batch(tmp_path, *lines)
    assert resume(source, output, "--url", server.url) == 1
    found = answers(output)
    assert set(found) == {"half \ud800", "in it", "nan", "line-4", "good"}
    assert found["good"]["error"] is None and found["half \ud800"]["error"] is None
    assert found["nan"]["response"]["status_code"] == 400 and found["line-4"]["response"] is None
    before = output.read_bytes()
    assert resume(source, output, "--url", server.url) == 1, "what failed is asked again, and fails again"
    good = [text for text in before.splitlines() if b'"error": null' in text]
    assert output.read_bytes().splitlines()[:2] == good
    # Several are sent at a time, and written as they come back.
    after, expected = _without_ids(output.read_bytes()), _without_ids(before)
    assert sorted(after, key=lambda each: each["custom_id"]) == sorted(expected, key=lambda each: each["custom_id"])


BAD, GOOD = (b"HTTP/1.1 %s\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}" % status
             for status in (b"500 Oh", b"200 OK"))


def test_what_failed_is_asked_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = batch(tmp_path, *(line(f"r{i}", prompt="bad" if i % 2 else "good") for i in range(6)))
    output.touch(mode=0o640)
    (tmp_path / "link").symlink_to(output)
    with odd_server(lambda request: BAD if b"bad" in request else GOOD) as url:
        for _ in range(2):
            assert resume(source, tmp_path / "link", "--url", url) == 1
    assert "3 requests answered, 3 of them with an error; 3 were there already; 3 had failed before" in \
        capsys.readouterr().out
    good = {text for text in output.read_bytes().splitlines() if b'"error": null' in text}
    assert {name for name, entry in answers(output).items() if entry["error"]} == {"r1", "r3", "r5"}
    source.write_text("\n".join(text for text in source.read_text().splitlines() if '"r5"' not in text))
    with odd_server(lambda request: GOOD) as url:
        assert resume(source, output, "--url", url) == 1, "an error is left, though nobody asks for it any more"
        assert "1 errors are there of requests that the batch does not hold" in capsys.readouterr().out
        assert {name for name, entry in answers(output).items() if entry["error"]} == {"r5"}
        source.write_text(source.read_text() + "\n" + line("r5", prompt="bad"))
        assert resume(source, output, "--url", url) == 0
    assert len(answers(output)) == 6 and good <= set(output.read_bytes().splitlines())
    assert (tmp_path / "link").is_symlink() and output.stat().st_mode & 0o777 == 0o640
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "link", "out.jsonl"]


def test_interrupted_while_failed_lines_are_replaced(tmp_path: Path) -> None:
    """At every system call that changes a file, by an end that no handler sees: one line an id, and none lost."""
    source, output = batch(tmp_path, *(line(f"r{i}", prompt="bad" if i % 2 else "good") for i in range(4)))
    with odd_server(lambda request: BAD if b"bad" in request else GOOD) as url:
        assert resume(source, output, "--url", url, "--concurrency", "1") == 1
    whole, seen = output.read_bytes(), set()
    for stop in ("open", "os.rename", "os.remove", "os.chmod"):
        for count in range(1, 9):
            output.write_bytes(whole)
            done = subprocess.run([sys.executable, "-c", DIE_AT, stop, str(count), str(output), "r1", "r3"], cwd=ROOT,
                                  check=False)
            names = list(answers(output))
            assert names in (["r0", "r1", "r2", "r3"], ["r0", "r2"]), (stop, count)
            seen.add((stop, done.returncode, len(names)))
            if done.returncode == 0:
                break
            with odd_server(lambda request: GOOD) as url:
                assert resume(source, output, "--url", url) == 0
            assert sorted(answers(output)) == ["r0", "r1", "r2", "r3"]
    assert {("open", -9, 4), ("os.rename", -9, 4), ("open", 0, 2)} <= seen


DIE_AT = """
import os, signal, sys
from pathlib import Path
from serving.commands.output_file import open_locked, replace_locked
from serving.commands.run_batch import good_lines
stop, count, output, *again = sys.argv[1:]
left = int(count)
def audit(event, args):
    global left
    if event == stop and "out.jsonl" in str(args[0]):
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
with open_locked(Path(output)):
    sys.addaudithook(audit)
    with replace_locked(Path(output), good_lines(Path(output), set(again))):
        pass
"""


def test_a_disk_that_is_full(server: ServerProcess, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, _ = batch(tmp_path, line("a", prompt="x", **GREEDY))
    assert resume(source, Path("/dev/full"), "--url", server.url) == 1
    assert "cannot be written: No space left on device" in capsys.readouterr().err
