"""Lines of the log by themselves: both formats, what cannot be forged, and a writer that never waits."""

from __future__ import annotations

import json
import logging
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from fastapi.responses import StreamingResponse

from serving.api.errors import install_handlers
from serving.observe.call_log import CallLog
from serving.observe.log_rate import AtMost, NotAgain
from serving.observe.throughput_log import ThroughputLog
from tests.serving.server_process import ROOT
from xllm import logs
from xllm.errors import ConfigError
from xllm.log_writer import MAX_WAITING, LogWriter
from xllm.logs import JsonFormat, TextFormat
from xllm.stats import EngineStats

HOSTILE = 'a"b\\c\n2026-01-01 00:00:00.000 INFO api x: forged\r\x1b[2J\u2028\u0085\ud800é'


def record(text: str, *args: object, error: BaseException | None = None, **extra: object) -> logging.LogRecord:
    made = logging.LogRecord("xllm.x", logging.WARNING, "x.py", 1, text, args,
                             None if error is None else (type(error), error, None))
    made.__dict__.update(extra)
    return made


def test_text() -> None:
    line = TextFormat("rank0").format(record("%d of %s", 1, "two", fields={"a": 1.5, "b": None, "c": "d e"}, said=()))
    assert re.fullmatch(r'\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} WARNING rank0 xllm.x: 1 of two a=1.5 c="d e"', line)


def test_json() -> None:
    fields = {"status": 200, "key": None, "x": HOSTILE}
    shown = json.loads(JsonFormat("api").format(record("%s", HOSTILE, fields=fields)))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", shown.pop("time"))
    clean = HOSTILE.replace("\ud800", "\\ud800")
    assert shown == {"level": "WARNING", "process": "api", "logger": "xllm.x", "message": clean, "status": 200,
                     "key": None, "x": clean}


@pytest.mark.parametrize("form", [TextFormat, JsonFormat])
def test_what_strangers_send_makes_no_line(form: type[TextFormat]) -> None:
    """CWE-117: in the message, in a field, in an exception's text."""
    text = form("api").format(record("%s", HOSTILE, error=ValueError(HOSTILE), fields={"x": HOSTILE}))
    first, *rest = text.split("\n")
    assert all(line.startswith("    ") for line in rest) and (form is TextFormat or not rest)
    assert len(text.splitlines()) == 1 + len(rest) and "\x1b" not in text and "\r" not in text
    assert first.count("forged") >= 2 and "ValueError" in text
    text.encode()


def test_a_mistake_of_the_logger_is_a_line() -> None:
    assert "%d of (1, 2)" in TextFormat("api").format(record("%d of", 1, 2))
    assert len(TextFormat("api").format(record("%s", "x" * 100_000))) < 20_000


def test_the_environment_is_read_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLLM_LOG", "loud")
    with pytest.raises(ConfigError, match="XLLM_LOG must be one of critical"):
        logs.configure("api")


def test_a_writer_drops_and_says_how_much() -> None:
    reader, writer = os.pipe()
    log = LogWriter(writer, lambda num_lost: f"lost {num_lost}")
    started_s = time.monotonic()
    for number in range(MAX_WAITING + 1000):
        log.put(f"{number:0200d}")
    assert time.monotonic() - started_s < 2.0 and 0 < log.num_lost <= 1000  # the pipe may have taken some
    text, told, num_others = b"", 0, 0
    while not told or num_others < MAX_WAITING + 1000 - log.num_lost:  # all that was not lost does come
        text += os.read(reader, 65536)
        said = re.findall(rb"lost (\d+)\n", text)
        told, num_others = sum(map(int, said)), text.count(b"\n") - len(said)
    assert told == log.num_lost
    os.close(reader)
    log.put("nobody is there")  # no error, and no signal
    log.flush()


def test_a_writer_says_how_much_a_full_disk_cost(tmp_path: Path) -> None:
    """A file that may not grow: the second line is torn, the third lost."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    fd = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    log = LogWriter(fd, lambda num_lost: f"lost {num_lost}")
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, limit[1]))
        for line in ("first", "second", "third"):
            log.put(line)
        log.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    log.put("fourth")
    log.flush()
    until_s = time.monotonic() + 5
    while (text := (tmp_path / "log").read_text()).count("\n") < 4 and time.monotonic() < until_s:
        time.sleep(0.01)  # the complaint may come behind the line
    os.close(fd)
    assert text.startswith("first\nseco\n") and sorted(text.splitlines()[2:]) == ["fourth", "lost 2"]


def test_libraries_warnings_and_threads_log_alike() -> None:
    code = ("import logging, threading, warnings; from xllm import logs; logs.configure('engine'); logs.take_over()\n"
            "logging.getLogger('a.library').warning('one'); logging.getLogger('a.library').info('none')\n"
            "logging.getLogger('backends.x').info('two'); warnings.warn('three')\n"
            "t = threading.Thread(target=lambda: 1 / 0, name='four'); t.start(); t.join(); raise KeyError('five')")
    for form in ("text", "json"):
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                              env={**os.environ, "XLLM_LOG_FORMAT": form})
        assert done.returncode == 1 and done.stdout == ""
        lines = [line for line in done.stderr.splitlines() if not line.startswith("    ")]
        assert len(lines) == 5, done.stderr
        if form == "json":
            assert [json.loads(line)["level"] for line in lines] == ["WARNING", "INFO", "WARNING", "ERROR", "CRITICAL"]
            assert "KeyError: 'five'" in json.loads(lines[-1])["exception"]
        else:
            assert all(re.match(r"[\d-]{10} [\d:.]{12} [A-Z]+ engine [\w.]+: ", line) for line in lines)


async def test_an_error_is_logged_once_with_its_request(caplog: pytest.LogCaptureFixture) -> None:
    app = FastAPI()
    install_handlers(app)

    @app.get("/fails")
    async def fails() -> None:
        raise KeyError("secret")

    @app.get("/breaks")
    async def breaks() -> StreamingResponse:
        async def pieces():  # type: ignore[no-untyped-def]
            yield b"a"
            raise KeyError("secret")

        return StreamingResponse(pieces())

    transport = httpx.ASGITransport(CallLog(app, log_requests=True))  # raises what uvicorn would have logged
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
        with caplog.at_level(logging.INFO):
            answered = await client.get("/fails", headers={"X-Request-Id": "mine"})
            assert answered.status_code == 500 and "under the request id mine" in answered.json()["error"]["message"]
            assert answered.headers["x-request-id"] == "mine" and "secret" not in answered.text
            assert [r.name for r in caplog.records if r.exc_info] == ["xllm.api"]
            line = next(r for r in caplog.records if r.name == "xllm.request")
            assert (line.levelname, line.getMessage()) == ("WARNING", "GET /fails 500 failed")
            caplog.clear()
            with pytest.raises(KeyError) as broken:
                await client.get("/breaks")
            assert [r.getMessage() for r in caplog.records if r.name.startswith("xllm")] == ["unexpected error",
                                                                                            "GET /breaks 200 failed"]
    of_uvicorn = logging.LogRecord("uvicorn.error", logging.ERROR, "x.py", 1, "Exception in ASGI application\n", (),
                                   (KeyError, broken.value, None))
    assert not NotAgain().filter(of_uvicorn) and NotAgain().filter(record("x", error=KeyError("another")))


def test_refusals_without_end_are_counted() -> None:
    now = 0.0
    rate = AtMost(2, clock=lambda: now)
    assert [rate.allow() for _ in range(5)] == [True, True, False, False, False]
    now = 1.0
    assert rate.allow() and rate.complaint() == " (and 3 more refused, without lines)" and rate.complaint() == ""


class Engine:
    stats = EngineStats()

    @property
    def engines(self) -> tuple[Engine, ...]:
        return (self,)


def test_throughput() -> None:
    now, engine = 0.0, Engine()
    log = ThroughputLog(engine, clock=lambda: now)  # type: ignore[arg-type]
    now = 10.0
    assert log.fields() is None
    engine.stats = EngineStats(num_steps=5, prompt_tokens_total=100, generation_tokens_total=25, num_running=2,
                               prefix_queries_total=100, prefix_hits_total=64, kv_usage=0.25)
    now = 20.0
    assert log.fields() == {"prompt_tokens_per_s": 10.0, "generated_tokens_per_s": 2.5, "running": 2, "waiting": 0,
                            "kv_usage": 0.25, "prefix_hit_rate": 0.64}
    engine.stats = EngineStats(num_steps=1, prompt_tokens_total=10)  # it was started again
    now = 30.0
    fields = log.fields()
    assert fields is not None and (fields["prompt_tokens_per_s"], fields["generated_tokens_per_s"]) == (1.0, 0.0)
    now = 40.0
    assert log.fields() is None
