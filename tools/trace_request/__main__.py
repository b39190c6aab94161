"""Starts the real server and its engine, sends one streamed chat request, and counts from what the interpreter saw.

    python -m tools.trace_request [--json FILE] [--max-tokens N] [-- FLAGS of `xllm serve`]

A hop is a station of `stations.py`, which says by name what one is; the trace must hold them all in their order, and
nothing else of ours, or this fails. So must the types that carry the request. With --functions the trace itself is
shown: each function of ours (module and name) by its first visit, in the order of the visits in all processes. Those
that also run while there is no request are left out, and so are types of which new objects come then (heartbeats). A
type is met if an object of it is handed to a function or returned and was not there for the request before, which was
the same. A room is a module: consecutive functions in one module are one room entered; `returns` are rooms entered
again, in each process.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import httpx

from serving.commands.output_file import check_output
from tools.trace_request.recorder import FOLDER
from tools.trace_request.stations import ASIDE, BY_THE_CLOCK, STATIONS, complaints, num_crossings

ROOT = Path(__file__).resolve().parents[2]
ADDRESS = re.compile(r"on (http://127\.0\.0\.1:\d+)")
SITE = "from tools.trace_request.recorder import install\n\ninstall()\n"
START_S, ANSWER_S, IDLE_S, SETTLE_S = 180.0, 120.0, 2.5, 0.3
MESSAGES = [{"role": "user", "content": "Write a function that adds two numbers."}]
PROCESSES = {"serving.commands.cli": "api", "engine_process": "engine"}  # by a word of the command


@dataclass(frozen=True)
class Visit:
    process: str
    module: str
    function: str


@dataclass(frozen=True)
class Trace:
    """visits in order; types by the order in which they were first handed on; left_out: functions that run anyway."""

    visits: list[Visit]
    types: list[str]
    left_out: int

    @property
    def rooms(self) -> list[str]:
        """The modules that were entered, process by process: what two processes do at once comes in any order."""
        by_process = sorted(self.visits, key=lambda visit: visit.process)
        return [module for (_, module), _ in groupby(by_process, key=lambda visit: (visit.process, visit.module))]

    def complaints(self) -> list[str]:
        """What it and the list of stations say differently."""
        visits = [(visit.process, visit.module, visit.function) for visit in self.visits]
        return complaints(visits, self.types, STATIONS, ASIDE, BY_THE_CLOCK)

    def numbers(self) -> dict[str, int]:
        modules = {(visit.process, visit.module) for visit in self.visits}
        return {"hops": len(STATIONS), "types": sum(len(station.makes) for station in STATIONS),
                "crossings": num_crossings(STATIONS), "functions": len(self.visits), "modules": len(modules),
                "rooms_entered": len(self.rooms), "returns": len(self.rooms) - len(modules),
                "types_met": len(self.types), "left_out": self.left_out}


class Traced:
    """`xllm serve` with a recorder in each of its processes."""

    def __init__(self, folder: Path, flags: list[str]):
        self.folder = folder
        (folder / "sitecustomize.py").write_text(SITE)
        path = os.pathsep.join([str(folder), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._log = folder / "log"
        command = [sys.executable, "-m", "serving.commands.cli", "serve", "--port", "0",
                   "--no-adaptive-threads", *flags]  # what neighbours cause is no station
        with self._log.open("wb") as out:
            self._process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT,
                                             env={**os.environ, "PYTHONPATH": path, FOLDER: str(folder)})

    def url(self) -> str:
        """Where it listens, once it is ready. Raises RuntimeError with what it said instead."""
        until = time.monotonic() + START_S
        while time.monotonic() < until and self._process.poll() is None:
            text = self._log.read_text(errors="replace")
            found = ADDRESS.search(text)
            if found and "curl" in text:  # the last line of the start
                return found[1]
            time.sleep(0.1)
        raise RuntimeError(f"the server did not start:\n{self._log.read_text(errors='replace')}")

    def enter(self, phase: str) -> None:
        """Tell all recorders once the last answer's end is over, and wait until they know."""
        time.sleep(SETTLE_S)
        (self.folder / phase).touch()
        time.sleep(SETTLE_S)

    def reports(self) -> dict[str, dict[str, Any]]:
        """What the recorders of PROCESSES wrote, by the process's name."""
        until, found = time.monotonic() + ANSWER_S, dict[str, dict[str, Any]]()
        while len(found) < len(PROCESSES) and time.monotonic() < until:
            time.sleep(0.1)
            for file in self.folder.glob("*.json"):
                report = json.loads(file.read_text())
                name = next((name for word, name in PROCESSES.items() if any(word in a for a in report["command"])), "")
                if name:
                    found[name] = report
        if len(found) < len(PROCESSES):
            raise RuntimeError(f"no trace from {', '.join(PROCESSES.values() - found.keys())}")
        return found

    def close(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def record(flags: list[str], max_tokens: int) -> Trace:
    """The trace of one request, after two like it."""
    with tempfile.TemporaryDirectory(prefix="xllm-trace-") as folder:
        traced = Traced(Path(folder), flags)
        try:
            stays_open = httpx.Limits(keepalive_expiry=None)
            with httpx.Client(base_url=traced.url(), timeout=ANSWER_S, limits=stays_open) as client:
                ask(client, max_tokens)
                traced.enter("warm")
                ask(client, max_tokens)
                traced.enter("idle")
                time.sleep(IDLE_S)
                traced.enter("record")
                ask(client, max_tokens)
                traced.enter("done")
            return merged(traced.reports())
        finally:
            traced.close()


def ask(client: httpx.Client, max_tokens: int) -> None:
    """A streamed chat request, read to its last event. Raises RuntimeError for any other answer."""
    body = {"messages": MESSAGES, "max_tokens": max_tokens, "temperature": 0, "stream": True, "ignore_eos": True}
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = list(response.iter_lines())
    if response.status_code != 200 or "data: [DONE]" not in lines:
        raise RuntimeError(f"status {response.status_code}: {lines[-3:]}")


def merged(reports: dict[str, dict[str, Any]]) -> Trace:
    """By the clock, which all processes of a machine share."""
    visits, types, idle_types, left_out = list[tuple[int, Visit]](), dict[str, int](), set[str](), 0
    for process, report in reports.items():
        idle = {tuple(visit) for visit in report["idle"]}
        for module, function, when in report["visits"]:
            if (module, function) in idle:
                left_out += 1
            else:
                visits.append((when, Visit(process, module, function)))
        for name, when in report["types"].items():
            types[name] = min(when, types.get(name, when))
        idle_types |= {*report["idle_types"]}
    visits.sort(key=lambda visit: visit[0])
    carriers = sorted(types.keys() - idle_types, key=lambda name: types[name])
    return Trace([visit for _, visit in visits], carriers, left_out)


def table(trace: Trace) -> str:
    """The stations, each with where it is and what is born there, then the numbers."""
    lines = []
    for number, station in enumerate(STATIONS, 1):
        where = ", ".join(place.replace(":", " ") for place in (*station.at, *station.waits))
        made = ", ".join(name.rpartition(".")[2] for name in station.makes)
        lines.append(f"{number:3}  {station.process:6} {station.name:44} {where}{' -> ' + made if made else ''}")
    return "\n".join([*lines, "", *(f"{name:14}{count:5}" for name, count in trace.numbers().items())])


def functions_table(trace: Trace) -> str:
    """Each room entered with the functions visited in it, then the types."""
    lines, number = [], 1
    for (process, module), visits in groupby(trace.visits, key=lambda visit: (visit.process, visit.module)):
        names = [visit.function for visit in visits]
        lines.append(f"{number:4}  {process:6} {module:32} {', '.join(names)}")
        number += len(names)
    return "\n".join([*lines, "", "types: " + ", ".join(trace.types), ""])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.trace_request", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write functions, types and numbers to this file")
    parser.add_argument("--functions", action="store_true", help="show every function that was called")
    parser.add_argument("--max-tokens", type=int, default=8)
    parser.add_argument("flags", nargs="*", help="of `xllm serve`, after --")
    args = parser.parse_args()
    if args.json is not None:
        check_output(args.json, [Path(flag) for flag in args.flags])
    trace = record(args.flags, args.max_tokens)
    if args.functions:
        print(functions_table(trace))
    print(table(trace))
    if args.json is not None:
        functions = [[visit.process, visit.module, visit.function] for visit in trace.visits]
        args.json.write_text(json.dumps({"numbers": trace.numbers(), "types": trace.types, "functions": functions},
                                        indent=1))
    found = trace.complaints()
    for complaint in found:
        print(f"tools/trace_request/stations.py: {complaint}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
