"""`xllm master` for a benchmark, which ends as if by SIGTERM when its stdin does: `python -m
serving.commands.bench.measured_master [--samples FILE] FLAG...`, with the flags of `xllm master`.

--samples: where its main thread was whenever so much CPU time had passed since SIGUSR2, as JSON, written at its end.
Time of other threads, such as zmq's own, which encrypts, falls on whatever the main thread did then, mostly on waiting
in `select`.
"""

from __future__ import annotations

import json
import signal
import sys
from collections import Counter
from pathlib import Path
from types import FrameType

from serving.commands.cli import main
from serving.commands.owned_server import end_with_owner

INTERVAL_S = 0.001  # of CPU time between samples. Chosen: the kernel's ticks, which are longer, are what decides


class CpuSampler:
    """own: samples by the function that ran. total: by every function that was on the stack, once a sample."""

    def __init__(self) -> None:
        self.own, self.total = Counter[str](), Counter[str]()
        self.num_samples = 0

    def start(self) -> None:
        """From now on; in the main thread."""
        signal.signal(signal.SIGPROF, self._note)
        signal.setitimer(signal.ITIMER_PROF, INTERVAL_S, INTERVAL_S)

    def stop(self) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if frame is None:
            return
        self.num_samples += 1
        self.own[_name(frame)] += 1
        seen = set[str]()
        while frame is not None:
            seen.add(_name(frame))
            frame = frame.f_back
        self.total.update(seen)


def _name(frame: FrameType) -> str:
    """As `xllm/client/remote.py:RemoteClient._read`."""
    code = frame.f_code
    own = getattr(code, "co_qualname", code.co_name)  # Python 3.10 has the shorter one only
    return f"{'/'.join(code.co_filename.split('/')[-3:])}:{own}"


def run(argv: list[str]) -> int:
    """Returns the master's exit code."""
    end_with_owner()
    if argv[:1] != ["--samples"]:
        return main(["master", *argv])
    sampler = CpuSampler()
    signal.signal(signal.SIGUSR2, lambda signum, frame: sampler.start())
    try:
        return main(["master", *argv[2:]])
    finally:
        sampler.stop()
        Path(argv[1]).write_text(json.dumps({"samples": sampler.num_samples, "own": sampler.own,
                                             "total": sampler.total}))


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
