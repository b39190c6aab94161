"""Compiles foreign grammars in a process of its own: `python -m xllm.structured.worker`, started by `checker.py`.

JSON lines on stdin and stdout. The first line in is a `VocabularySource`; each one after it a `StructuredOutput`, to
which the answer is `{"error": null or a reason}`. What takes too long or too much memory ends the process: the kernel's
limits on CPU time and address space are set for that, and how it ended says why.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from typing import Any

from xllm.errors import RequestError
from xllm.structured.grammar import GrammarError, build_matcher, grammar_text, probe
from xllm.structured.spec import StructuredOutput
from xllm.structured.vocabulary import VocabularySource

COMPILE_CPU_S = 2
COMPILE_MEMORY_BYTES = 2**30
NICENESS = 5


def main() -> None:
    os.nice(NICENESS)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    vocabulary = VocabularySource(**json.loads(sys.stdin.readline())).build()
    _limit_memory()
    _answer({})
    for line in sys.stdin:
        _limit_cpu_time()
        try:
            matcher = build_matcher(vocabulary, grammar_text(StructuredOutput(**json.loads(line))))
            probe(matcher, vocabulary)
            _answer({"error": None})
        except (GrammarError, RequestError, ValueError) as error:
            _answer({"error": str(error) or type(error).__name__})
        except MemoryError:
            _answer({"error": "it needs too much memory"})


def _answer(content: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(content) + "\n")
    sys.stdout.flush()


def _limit_memory() -> None:
    """COMPILE_MEMORY_BYTES from here on."""
    with open("/proc/self/statm", encoding="ascii") as file:
        used_bytes = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used_bytes + COMPILE_MEMORY_BYTES,) * 2)


def _limit_cpu_time() -> None:
    """COMPILE_CPU_S from here on (whole seconds are all that the kernel takes); then SIGXCPU ends the process."""
    soft_s = math.ceil(time.process_time() + COMPILE_CPU_S)
    resource.setrlimit(resource.RLIMIT_CPU, (soft_s, resource.RLIM_INFINITY))


if __name__ == "__main__":
    main()
