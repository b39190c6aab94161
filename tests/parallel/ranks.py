"""Real processes that are the ranks of a group, forked by a process that has imported torch once.

`Ranks` starts that process; each `run` forks ranks that call one function, and waits for them a bounded time. Nothing
here can hang: what is late is killed, and a rank that is killed counts as failed.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
START_S = 120.0


@dataclass(frozen=True)
class Outcome:
    """code: the exit status, negative for a signal; None: killed because it was late. text: what it printed."""

    code: int | None
    text: str


class Ranks:
    """folder: for what ranks print, and where they meet. imports: modules that ranks find imported."""

    def __init__(self, folder: Path, *imports: str):
        self.folder, self.num_runs = folder, 0
        env = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        self.process = subprocess.Popen([sys.executable, "-m", "tests.parallel.ranks", *imports], cwd=ROOT, env=env,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # fmt: skip
        self._answer(START_S)

    def run(
        self, function: str, size: int, *, env: dict[str, str] | None = None,
        env_of: list[dict[str, str]] | None = None, timeout_s: float = 60.0, **arguments: Any,
    ) -> list[Outcome]:  # fmt: skip
        """Call `module:function(rank=, size=, store=, **arguments)` in `size` processes at once.

        env: added to the environment of all ranks, env_of: of each.
        """
        self.num_runs += 1
        folder = self.folder / str(self.num_runs)
        folder.mkdir()
        envs = [{**(env or {}), **(env_of[rank] if env_of else {})} for rank in range(size)]
        order = {"function": function, "envs": envs, "folder": str(folder), "timeout_s": timeout_s,
                 "arguments": {"size": size, "store": f"file://{folder / 'store'}", **arguments}}  # fmt: skip
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        codes = self._answer(timeout_s + 10.0)
        return [Outcome(code, (folder / f"{rank}.txt").read_text()) for rank, code in enumerate(codes)]

    def check(self, function: str, size: int, **given: Any) -> list[str]:
        """`run`, and all of them succeed. What they printed."""
        outcomes = self.run(function, size, **given)
        bad = [f"rank {rank}: {each.code}\n{each.text}" for rank, each in enumerate(outcomes) if each.code != 0]
        assert not bad, "\n".join(bad)
        return [each.text for each in outcomes]

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        try:
            self.process.wait(20)
        finally:
            self.process.kill()
            self.process.stdout.close()

    def _answer(self, timeout_s: float) -> list[int | None]:
        out = self.process.stdout
        assert out is not None
        if not select.select([out], [], [], timeout_s)[0]:
            self.process.kill()
            raise TimeoutError(f"nothing came back within {timeout_s} s")
        line = out.readline()
        assert line, "the process that forks ranks has ended"
        answer: list[int | None] = json.loads(line)
        return answer


def _be_rank(order: dict[str, Any], rank: int) -> None:
    """In the child, which ends like any program: with all that runs at the end of one."""
    output = os.open(f"{order['folder']}/{rank}.txt", os.O_WRONLY | os.O_CREAT, 0o600)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(order["envs"][rank])
    module, _, name = order["function"].partition(":")
    getattr(importlib.import_module(module), name)(rank=rank, **order["arguments"])


def _wait(children: list[int], timeout_s: float) -> list[int | None]:
    """Exit statuses. Who is late is killed, and has none."""
    codes: dict[int, int | None] = {}
    end = time.monotonic() + timeout_s
    while len(codes) < len(children):
        for child in [each for each in children if each not in codes]:
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                codes[child] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                codes[child] = None
        time.sleep(0.005)
    return [codes[child] for child in children]


def main(imports: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch_npu's own sources provoke
        for module in imports:
            importlib.import_module(module)
    gc.freeze()  # children need not look at all of it when they end
    print("[]", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        children = []
        for rank in range(len(order["envs"])):
            child = os.fork()
            if child == 0:
                _be_rank(order, rank)
                return
            children.append(child)
        print(json.dumps(_wait(children, order["timeout_s"])), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
