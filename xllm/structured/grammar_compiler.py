"""Compiles foreign grammars in a process of its own: `python -m xllm.structured.grammar_compiler`, started by
`checker.py`.

JSON lines on stdin and stdout. The first line in is a `VocabularySource`; each one after it a `StructuredOutput`, to
which the answer is `{"error": null or a reason}`. What takes too long or far too much memory ends the process: the
kernel's limits on CPU time and address space are set for that, and how it ended says why.
"""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import sys
import time
from typing import TYPE_CHECKING, Any

from xllm.structured.form_check import check_form
from xllm.structured.grammar import build_matcher, grammar_text
from xllm.structured.grammar_probe import DeadEnds, probe_cost
from xllm.structured.heap import allocated_bytes
from xllm.structured.spec import StructuredOutput
from xllm.structured.token_trie import VocabularySource

if TYPE_CHECKING:
    from llguidance import LLTokenizer

COMPILE_CPU_S = 2  # for one grammar. Chosen: real schemas take milliseconds
# For compiling one grammar. Chosen: two workers of it fit beside a model on a machine of the smallest kind.
# For compiling one grammar. Chosen: far more than real schemas need; two workers may use it at once.
COMPILE_MEMORY_BYTES = 2**30
# What one grammar may keep allocated, for as long as the engine keeps it. Chosen: most need less than a tenth of it.
GRAMMAR_BYTES = 32 * 2**20
TOO_MUCH_MEMORY = "it needs too much memory"
# Of the process, so that steps go first. Chosen: beside one busy thread, Linux gives 5 about a quarter of a core.
NICENESS = 5


def main() -> None:
    os.nice(NICENESS)
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)  # sent to all of a service's processes; a drain still needs this one
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    vocabulary = VocabularySource(**json.loads(sys.stdin.readline())).build()
    dead_ends = DeadEnds()
    _limit_memory()
    _answer({})
    for line in sys.stdin:
        _limit_cpu_time()
        _answer({"error": _judge(vocabulary, dead_ends, line)})


def _judge(vocabulary: LLTokenizer, dead_ends: DeadEnds, line: str) -> str | None:
    """Why a specification cannot be honoured; None: it can."""
    before_bytes = allocated_bytes()
    try:
        spec = StructuredOutput(**json.loads(line))
        check_form(spec, dead_ends)
        matcher = build_matcher(vocabulary, grammar_text(spec))
        probe_cost(matcher, vocabulary)
    except MemoryError:
        return TOO_MUCH_MEMORY
    except RecursionError:
        return "it is nested too deep"
    except ValueError as error:  # GrammarError and RequestError among them
        return str(error) or type(error).__name__
    return TOO_MUCH_MEMORY if allocated_bytes() - before_bytes > GRAMMAR_BYTES else None


def _answer(content: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(content) + "\n")
    sys.stdout.flush()


def _limit_memory() -> None:
    """Limit the address space to COMPILE_MEMORY_BYTES more than is used now."""
    with open("/proc/self/statm", encoding="ascii") as file:
        used_bytes = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used_bytes + COMPILE_MEMORY_BYTES,) * 2)


def _limit_cpu_time() -> None:
    """Limit CPU time to COMPILE_CPU_S more than is used now (the kernel takes whole seconds); then SIGXCPU ends the
    process."""
    soft_s = math.ceil(time.process_time() + COMPILE_CPU_S)
    resource.setrlimit(resource.RLIMIT_CPU, (soft_s, resource.RLIM_INFINITY))


if __name__ == "__main__":
    main()
