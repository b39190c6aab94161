"""A rank that goes wrong: `xllm.worker.rank` with a fault that XLLM_TEST_FAULT names, on the rank that it names.

`corrupt:1`: the first KV block that rank 1 fills gets another number in it before its digest is taken.
`capture:1`: the first graph that rank 1 is to capture does not fit. `hang:1`: rank 1 never finishes its fifth step.
`raise:1`: it raises there. `end:1`: rank 1 ends as soon as it is to load.
"""

from __future__ import annotations

import os
import sys
import threading

from graph.checking import CheckingCapturer
from xllm.runner.model_runner import ModelRunner
from xllm.runner.step_checker import StepChecker
from xllm.worker.rank import main
from xllm.worker.worker import Worker


def corrupt() -> None:
    checked = StepChecker.checked

    def wrong(self, output):
        for _, blocks_B in self._filled:
            for block in blocks_B.tolist():
                self._kv_cache.layers[-1][-1][block].view(-1)[-1] += 1.0
        return checked(self, output)

    StepChecker.checked = wrong


def at_the_fifth_step(act) -> None:
    start = ModelRunner.start

    def wrong(self, plan):
        if plan.step == 5:
            act()
        return start(self, plan)

    ModelRunner.start = wrong


def end_at_the_load() -> None:
    Worker._load = lambda self, config: os._exit(3)


def capture_nothing_at_first() -> None:
    capture = CheckingCapturer.capture

    def wrong(self, function, *, pool, memory):
        CheckingCapturer.capture = capture
        raise MemoryError("no room for a graph")

    CheckingCapturer.capture = wrong


def fail() -> None:
    raise MemoryError("no room for logits")


if __name__ == "__main__":
    name, _, rank = os.environ["XLLM_TEST_FAULT"].partition(":")
    if sys.argv[2] == rank:
        {"capture": capture_nothing_at_first, "corrupt": corrupt, "end": end_at_the_load,
         "hang": lambda: at_the_fifth_step(threading.Event().wait), "raise": lambda: at_the_fifth_step(fail)}[name]()
    os._exit(main(sys.argv[1:]))
