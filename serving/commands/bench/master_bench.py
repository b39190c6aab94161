"""`xllm bench master`: what a master's own process takes for a request and for a streamed token.

Real processes: `xllm master`, and instances whose engines compute nothing (`null_instance.py`). This process asks for
chats over HTTP. A request's share is measured with short answers that are not streamed; a streamed token's with
streams of many tokens less those of one. CPU time is that of the master's process with all its threads, which has no
other processes, without what it takes while nobody asks. The same of FastAPI with nothing behind it (`bare_server.py`)
is the floor.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from serving.commands.bench import report
from serving.commands.bench.http_load import ChatAnswer, HttpLoad
from serving.commands.bench.null_cluster import child_process, last_line, null_cluster
from serving.commands.flags import FlagParser
from xllm import env
from xllm.cost.cost_model import StepPrices
from xllm.errors import ConfigError, XllmError

GOALS = {"us_a_request": 2000.0, "us_a_streamed_token": 120.0}
OPEN = (1, 16, 64)  # requests. Chosen: one caller, a few, and a busy master
SHORT_TOKENS = 8  # of the longest short answer; they have 1 to so many. Chosen: a label, a word or two
STREAM_TOKENS = 128  # of a streamed answer. Chosen: a short paragraph
PROMPT_WORDS = 30  # with the chat template some 64 tokens of the bundled model. Chosen: a question
FLOOR_ROUNDS = 1  # Chosen: it changes with the libraries only
IDLE_S = 3.0  # in which what an idle master takes is measured. Chosen: six signs of life of each instance
MAX_INSTANCES = 16  # Chosen: more would measure this machine's scheduler
MAX_STEP_MS = 1000.0  # Chosen: no model is so slow that the master would be what matters
WORDS = ("about", "after", "again", "before", "between", "change", "country", "different", "example", "family",
         "follow", "found", "house", "large", "letter", "light", "little", "mother", "number", "other", "paper",
         "people", "place", "point", "question", "right", "school", "should", "small")


def main(argv: list[str]) -> int:
    parser = FlagParser(prog="xllm bench master", description=__doc__.splitlines()[0])
    parser.add_argument("--instances", type=int, default=2, help="instances without a model behind the master")
    parser.add_argument("--step-ms", type=float, default=10.0, help="what their steps take")
    parser.add_argument("--open", default=",".join(map(str, OPEN)), help="numbers of open requests, parted by commas")
    parser.add_argument("--rounds", type=int, default=3, help="repetitions, of which the median counts")
    parser.add_argument("--samples", action="store_true", help="say as well where the master's CPU time went")
    parser.add_argument("--json", help="write the result to this file as well")
    args = parser.parse_args(argv)
    report.check(args.json)
    if not 1 <= args.instances <= MAX_INSTANCES:
        raise ConfigError(f"--instances must be in 1 to {MAX_INSTANCES}, got {args.instances}")
    if not 0 <= args.step_ms <= MAX_STEP_MS:
        raise ConfigError(f"--step-ms must be in 0 to {MAX_STEP_MS:g}, got {args.step_ms}")
    if args.rounds < 1:
        raise ConfigError(f"--rounds must be at least 1, got {args.rounds}")
    numbers = args.open.split(",")
    if not all(number.isdecimal() and int(number) for number in numbers):
        raise ConfigError(f"--open must be numbers of requests, got {args.open!r}")
    result = measure(args.instances, args.step_ms, [int(number) for number in numbers], args.rounds, args.samples)
    report.write(result, args.json)
    return 0


def measure(num_instances: int, step_ms: float, open_numbers: list[int], rounds: int,
            with_samples: bool) -> dict[str, Any]:
    instance = json.dumps({"prices": StepPrices(step_ms / 1000, 0.0)._asdict()})
    with tempfile.TemporaryDirectory(prefix="xllm-bench-") as folder:
        samples = Path(folder) / "samples"
        flags = ["--samples", str(samples)] if with_samples else []
        with null_cluster(instance, num_instances, flags, Path(folder)) as cluster:
            master = cluster.master.process.pid
            if with_samples:
                os.kill(master, signal.SIGUSR2)
            result = asyncio.run(_Asked(master, HttpLoad(cluster.address)).measure(open_numbers, rounds))
        if with_samples:
            result["samples"] = _told(json.loads(samples.read_text()))
        result["floor_by_open_requests"] = _floor(step_ms, open_numbers, Path(folder) / "bare")
    return {"benchmark": "master", "instances": num_instances, "step_ms": step_ms,
            "stream_tokens": STREAM_TOKENS, **result, "goals": GOALS}


def _floor(step_ms: float, open_numbers: list[int], log: Path) -> list[dict[str, Any]]:
    """What a server takes for such requests that has nothing to do."""
    report.note("measuring FastAPI with nothing behind it")
    with child_process(["serving.commands.bench.bare_server", str(step_ms)], env.for_child(), log) as server:
        asked = _Asked(server.process.pid, HttpLoad(server.said(last_line).removeprefix("http://")))
        found = asyncio.run(asked.measure(open_numbers, FLOOR_ROUNDS))
    return [{name: row[name] for name in ("open_requests", *GOALS)} for row in found["by_open_requests"]]


def cpu_s(pid: int) -> float:
    """CPU time of a process, user and system, all its threads: to the nanosecond, where /proc/PID/stat has hundredths
    of a second."""
    return time.clock_gettime(~pid << 3 | 2)  # its clock, as clock_getcpuclockid(3) says


# --- load


class _Asked:
    """The master's process `pid`, under load."""

    def __init__(self, pid: int, load: HttpLoad):
        self._pid, self._load, self._rng = pid, load, random.Random(0)
        self._idle = 0.0  # of the master's CPU time, seconds a second

    async def measure(self, open_numbers: list[int], rounds: int) -> dict[str, Any]:
        await self._load.ask(self._bodies(64, 4, True) + self._bodies(64, 4, False), 16)
        began_s, before_s = time.monotonic(), cpu_s(self._pid)
        await asyncio.sleep(IDLE_S)
        self._idle = (cpu_s(self._pid) - before_s) / (time.monotonic() - began_s)
        rows = [await self._row(number, rounds) for number in open_numbers]
        if children := _children(self._pid):
            raise XllmError(f"the master has processes that were not measured: {children}")
        return {"idle_us_a_second": round(1e6 * self._idle), "by_open_requests": rows,
                **{name: max(row[name] for row in rows) for name in GOALS}}

    async def _row(self, num_open: int, rounds: int) -> dict[str, Any]:
        shorts, tokens, firsts, writes = list[float](), list[float](), list[float](), list[float]()
        prompts, waits = list[int](), list[float]()
        num_short, num_streams = max(100, 20 * num_open), max(6, 2 * num_open)
        for _ in range(rounds):
            began_s = time.monotonic()
            short_s, answers = await self._cost(self._bodies(num_short, None, False), num_open)
            waits.append((time.monotonic() - began_s) / num_short)
            shorts.append(short_s)
            prompts += [answer.num_prompt_tokens for answer in answers]
            one_s, _ = await self._cost(self._bodies(num_short, 1, True), num_open)
            many_s, answers = await self._cost(self._bodies(num_streams, STREAM_TOKENS, True), num_open)
            tokens.append((many_s - one_s) / (STREAM_TOKENS - 1))
            firsts += [answer.first_s for answer in answers if answer.first_s]
            writes.append(sum(answer.num_writes for answer in answers) / len(answers))
        row = {"open_requests": num_open, "us_a_request": round(1e6 * median(shorts)),
               "us_a_streamed_token": round(1e6 * median(tokens), 1),
               "idle_us_a_request": round(1e6 * self._idle * median(waits)),  # that were taken off
               "us_a_request_of_rounds": [round(1e6 * one) for one in shorts],
               "us_a_streamed_token_of_rounds": [round(1e6 * one, 1) for one in tokens],
               "prompt_tokens": round(sum(prompts) / len(prompts), 1), "writes_a_stream": round(median(writes), 1),
               "stream_ttft_p50_ms": round(1000 * median(firsts), 1)}
        report.note(str(row))
        return row

    async def _cost(self, bodies: list[dict[str, Any]], num_open: int) -> tuple[float, list[ChatAnswer]]:
        """Seconds of the master's CPU time that each of these chats took."""
        began_s, before_s = time.monotonic(), cpu_s(self._pid)
        answers = await self._load.ask(bodies, num_open)
        spent_s = cpu_s(self._pid) - before_s - self._idle * (time.monotonic() - began_s)
        wanted = sum(body["max_tokens"] for body in bodies)
        if (given := sum(answer.num_tokens for answer in answers)) != wanted:
            raise XllmError(f"{wanted} tokens were asked for and {given} came")
        return spent_s / len(bodies), answers

    def _bodies(self, number: int, num_tokens: int | None, is_stream: bool) -> list[dict[str, Any]]:
        """Chats whose texts all differ. num_tokens: of the answers; None: 1 to `SHORT_TOKENS`."""
        bodies = []
        for place in range(number):
            text = " ".join(self._rng.choices(WORDS, k=PROMPT_WORDS))
            bodies.append({"messages": [{"role": "user", "content": text}], "ignore_eos": True, "stream": is_stream,
                           "max_tokens": num_tokens or 1 + place % SHORT_TOKENS,
                           **({"stream_options": {"include_usage": True}} if is_stream else {})})
        return bodies


def _children(pid: int) -> list[str]:
    """The command lines of a process's children."""
    pids = [child for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]
    return [Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip() for child in pids]


def _told(found: dict[str, Any]) -> dict[str, Any]:
    """Where the samples fell, in percent, the most first."""
    return {"samples": found["samples"], **{
        what: {name: round(100 * count / found["samples"], 1)
               for name, count in sorted(found[what].items(), key=lambda one: -one[1])[:40]}
        for what in ("own", "total")}}
