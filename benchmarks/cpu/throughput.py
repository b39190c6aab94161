"""`xllm bench throughput` with engines of other houses: `python -m benchmarks.cpu.throughput --vs llamacpp`."""

from __future__ import annotations

import sys

from benchmarks.cpu.peers import PEERS
from serving.commands.bench import throughput_bench
from serving.commands.bench.report import ended

if __name__ == "__main__":
    sys.exit(ended(lambda: throughput_bench.main(sys.argv[1:], PEERS, "python -m benchmarks.cpu.throughput")))
