"""A cluster without a model, for benchmarks: instances whose engines compute nothing (`null_instance.py`), and a real
master before them (`measured_master.py`), each a process of its own that ends when its stdin does.
"""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving.commands.bench import report
from serving.commands.run_batch import ADDRESS
from xllm import env
from xllm.child_process import run_module
from xllm.errors import XllmError

START_S = 180.0  # for a process to be ready. Chosen: many times what eight take that start on two cores
END_S = 20.0  # for a process to end by itself. Chosen: many times what one takes


@dataclass(frozen=True, slots=True)
class ChildProcess:
    """out: where it writes."""

    process: subprocess.Popen[bytes]
    out: Path

    @property
    def text(self) -> str:
        """What it has written."""
        return self.out.read_text(encoding="utf-8", errors="replace")

    def said(self, find: Callable[[str], str]) -> str:
        """What `find` finds in what it writes, once it does. Raises XllmError."""
        deadline_s = time.monotonic() + START_S
        while not (found := find(text := self.text)):
            if self.process.poll() is not None or time.monotonic() > deadline_s:
                raise XllmError(f"a process of the benchmark did not start:\n{text.strip()}")
            time.sleep(0.1)
        return found


@dataclass(frozen=True, slots=True)
class NullCluster:
    """address: HOST:PORT of the master's HTTP API."""

    master: ChildProcess
    instances: Sequence[ChildProcess]
    address: str

    @property
    def totals(self) -> list[dict[str, Any]]:
        """Of each instance, when all have ended: see `null_instance.py`. Raises XllmError."""
        found = []
        for instance in self.instances:
            line = last_line(text := instance.text)
            if not line.startswith("{"):
                raise XllmError(f"an instance of the benchmark did not end as it should:\n{text.strip()}")
            found.append(json.loads(line))
        return found


@contextmanager
def null_cluster(instance: str, num_instances: int, master_flags: Sequence[str], folder: Path) -> Iterator[NullCluster]:
    """A cluster whose instances have all joined. instance: what each is, as `null_instance.py` takes it. master_flags:
    of `measured_master.py`. folder: for what the processes write. Raises XllmError if one does not start."""
    own = env.for_child() | {"XLLM_CLUSTER_SECRET": secrets.token_hex(32)}
    with ExitStack() as stack:
        report.note(f"starting {num_instances} instances without a model")
        command = ["serving.commands.bench.null_instance", instance]
        instances = [stack.enter_context(child_process(command, own, folder / f"instance-{number}"))
                     for number in range(num_instances)]
        addresses = ",".join(instance.said(last_line) for instance in instances)
        command = ["serving.commands.bench.measured_master", *master_flags, "--port", "0", "--instances", addresses]
        master = stack.enter_context(child_process(command, own, folder / "master"))
        url = master.said(_url)
        master.said(lambda text: url if text.count(" has joined") >= num_instances else "")
        try:
            yield NullCluster(master, instances, url.removeprefix("http://"))
        finally:
            for child in (master, *instances):  # all at once, and then each is waited for
                _end(child.process)


@contextmanager
def child_process(command: list[str], environment: dict[str, str], out: Path) -> Iterator[ChildProcess]:
    """A process of ours, which ends when its stdin does. command: a module and its arguments. out: where it writes."""
    with out.open("wb") as file:
        process = subprocess.Popen([sys.executable, *run_module(command[0]), *command[1:]], stdin=subprocess.PIPE,
                                   stdout=file, stderr=file, env=environment)
    try:
        yield ChildProcess(process, out)
    finally:
        _end(process)
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _end(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.close()


def last_line(text: str) -> str:
    """Of what a process has written; "" as long as it is not whole."""
    return text.strip().rpartition("\n")[2] if text.endswith("\n") else ""


def _url(text: str) -> str:
    return found[1] if "curl" in text and (found := ADDRESS.search(text)) else ""
