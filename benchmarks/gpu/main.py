"""The command line: which sections run, in which processes, until when.

Sections run in a child process, so that what ends it (a fault of the GPU that leaves its context unusable, a crash, the
deadline) costs one section: the rest goes on in a new one, and what was found is in the file.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from benchmarks.gpu import compare, report
from benchmarks.gpu.origin import commit, source_digest
from benchmarks.gpu.profile import PROFILES, SECTIONS
from benchmarks.gpu.results import FAILED, OK, RUNNING, SKIPPED, ResultFile, faults, load, smoke_failure

if TYPE_CHECKING:
    from benchmarks.gpu.bench import Bench

ROOT = Path(__file__).parents[2]
# Nothing is to be fetched, and what libraries say about their progress is not of interest.
QUIET = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
UNUSABLE = 77  # exit status of a child whose device no longer works
GRACE_S = 5.0  # past the deadline, before a child is ended
OVERRUN_S = 25.0  # past a section's own time: its last row may begin just before that, and a kernel may hang
WATCH_S = 2.0  # between two looks at how far a child is


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("sections", nargs="+", metavar="SECTION",
                        help=f"{', '.join(SECTIONS)}, all; or: compare OLD NEW")  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="folder of gpu.json; it is continued if it is there")
    parser.add_argument("--deadline", type=float, default=560.0, help="seconds from now after which nothing runs")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: a dry run")
    parser.add_argument("--profile", default="quick", choices=PROFILES)
    parser.add_argument("--commit", help="what is measured, where there is no git")
    parser.add_argument("--worker-until", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--resumed", default="", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    unknown = set(args.sections) - {*SECTIONS, "all"}
    if unknown:
        parser.error(f"unknown section: {', '.join(sorted(unknown))}")
    if "all" in args.sections:
        args.sections = list(SECTIONS)
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0, or 1 if a check failed, a section broke off or a comparison found something."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["compare"]:
        return compare.main(arguments[1:])
    args = parse(arguments)
    if args.worker_until is not None:
        return work(args)
    return supervise(args)


def supervise(args: argparse.Namespace) -> int:
    until = time.time() + args.deadline
    results = ResultFile(args.out, commit=args.commit or commit(ROOT), source=source_digest(ROOT),
                         profile=args.profile, device=args.device)  # fmt: skip
    for name in args.sections:
        results.sections.pop(name, None)
    results.write()
    left, resumed = [name for name in args.sections if name != "report"], ""
    while left := _in_time(results.path.parent, args, left, until):
        code = _run_child(args, left, resumed, until)
        left, resumed = _account(args.out, left, code)
        if "smoke" in args.sections and (why := smoke_failure(load(args.out))):
            stop(ResultFile(args.out), left, why)
            break
    if "report" in args.sections:
        report.write(args.out)
    found = faults(load(args.out))
    for fault in found:
        print(f"FAULT {fault}", file=sys.stderr)
    return 1 if found else 0


def _in_time(out: Path, args: argparse.Namespace, left: list[str], until: float) -> list[str]:
    """Those that fit the time that is left, if nothing runs before them; the others are skipped."""
    late = [name for name in left if until - time.time() < PROFILES[args.profile].section_s[name]]
    if late:
        results = ResultFile(out)
        for name in late:
            skip(results, name, PROFILES[args.profile].section_s[name], until - time.time())
    return [name for name in left if name not in late]


def stop(results: ResultFile, left: list[str], why: str) -> None:
    """Nothing more runs. A section that was begun has failed."""
    for name in left:
        begun = results.sections.get(name, {}).get("status") == RUNNING
        results.end(name, FAILED if begun else SKIPPED, error=f"stopped: {why}")


def skip(results: ResultFile, name: str, thought_s: float, left_s: float) -> None:
    results.end(name, SKIPPED, error=f"thought to take {thought_s:.0f} s, {max(left_s, 0):.0f} s are left")


def _run_child(args: argparse.Namespace, sections: list[str], resumed: str, until: float) -> int:
    """Its exit status. It is ended a little after the deadline, or when one of its sections takes the others' time,
    with all that it started."""
    command = [sys.executable, "-m", "benchmarks.gpu", *sections, "--out", str(args.out), "--device", args.device,
               "--profile", args.profile, "--worker-until", str(until), "--resumed", resumed]  # fmt: skip
    # A dry run shares its processor: threads that wait for each other would take most of the time.
    environment = os.environ | QUIET | ({"OMP_NUM_THREADS": "1"} if args.device == "cpu" else {})
    child = subprocess.Popen(command, cwd=ROOT, start_new_session=True, env=environment)
    try:
        return _watch(child, args.out, until)
    except BaseException as reason:
        os.killpg(child.pid, signal.SIGKILL)
        if not isinstance(reason, subprocess.TimeoutExpired):
            raise
        return child.wait()


def _watch(child: subprocess.Popen[bytes], out: Path, until: float) -> int:
    """Wait for it. Raises TimeoutExpired when it is to be ended."""
    while True:
        left_s = min(until + GRACE_S, _section_end(out)) - time.time()
        try:
            return child.wait(timeout=min(WATCH_S, max(1.0, left_s)))
        except subprocess.TimeoutExpired:
            if left_s <= 0:
                raise


def _section_end(out: Path) -> float:
    """When the section that runs now must have ended at the latest."""
    try:
        sections = load(out)["sections"]
    except (OSError, ValueError):
        return float("inf")
    ends = [facts["until"] for facts in sections.values() if facts["status"] == RUNNING]
    return min(ends, default=float("inf")) + OVERRUN_S


def _account(out: Path, left: list[str], code: int) -> tuple[list[str], str]:
    """What is still to do after a child has ended, and the section to go on with where it lost its device. Another
    section that it left open has failed."""
    results = ResultFile(out)
    status = {name: results.sections.get(name, {}).get("status") for name in left}
    rest = [name for name in left if status[name] is None]
    broken = next((name for name in left if status[name] == RUNNING), "" if len(rest) < len(left) else rest[0])
    if broken and code == UNUSABLE:
        return [broken, *(name for name in rest if name != broken)], broken
    if broken:
        late = time.time() > results.sections.get(broken, {}).get("until", float("inf"))
        results.end(broken, FAILED, error=f"its process ended: exit status {code}{', out of time' if late else ''}")
    return [name for name in rest if name != broken], ""


def work(args: argparse.Namespace) -> int:
    """Run sections in this process; each ends with a status in the file. None may take the time that later ones are
    thought to need."""
    from backends.backend import BackendError
    from benchmarks.gpu.bench import Bench, DeviceLost
    from benchmarks.gpu.device import Device

    results, profile = ResultFile(args.out), PROFILES[args.profile]
    try:
        device = Device(args.device)
    except BackendError as error:
        for name in args.sections:
            results.end(name, FAILED, error=str(error))
        return 1
    with TemporaryDirectory(prefix="xllm-gpu-") as scratch:
        bench = Bench(device, profile, results, until_s=args.worker_until, scratch=Path(scratch), out=args.out)
        for i, name in enumerate(args.sections):
            left_s = args.worker_until - time.time()
            if left_s < profile.section_s[name]:
                skip(results, name, profile.section_s[name], left_s)
                continue
            later_s = sum(profile.section_s[later] for later in args.sections[i + 1 :])
            bench.until_s = time.time() + max(profile.section_s[name], left_s - later_s)
            try:
                _run_section(bench, name, resumed=name == args.resumed)
            except DeviceLost as error:
                print(f"{name}: the device is lost: {error}", file=sys.stderr, flush=True)
                return UNUSABLE
            if name == "smoke" and (why := smoke_failure(results.data)):
                stop(results, args.sections[i + 1 :], why)
                return 1
    return 0


def _run_section(bench: Bench, name: str, *, resumed: bool) -> None:
    from benchmarks.gpu.bench import DeviceLost

    began, bench.section = time.time(), name
    bench.results.begin(name, keep_rows=resumed, until=bench.until_s)
    status, facts = OK, dict[str, Any]()
    try:
        importlib.import_module(f"benchmarks.gpu.{name}").run(bench)
    except DeviceLost:
        raise
    except Exception as error:
        status = FAILED
        facts = {"error": f"{type(error).__name__}: {error}"[:2000], "traceback": traceback.format_exc()[-8000:]}
    bench.results.end(name, status, seconds=round(time.time() - began, 2), **facts)
    print(f"{name}: {status}, {time.time() - began:.1f} s", flush=True)
