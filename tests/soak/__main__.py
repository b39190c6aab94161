"""`python -m tests.soak`: prints its figures as JSON; exit code 1 when something leaked or was answered wrongly."""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

from serving.commands.bench import report
from tests.soak.run import run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--concurrency", type=int, default=24)
    parser.add_argument("--seconds", type=float, default=math.inf, help="send no new request after so long")
    parser.add_argument("--json", help="write the result to this file as well")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, tqdm(total=args.requests, desc="requests", mininterval=1.0) as bar:
        log = Path(folder) / "log.txt"
        result = run(args.requests, args.seed, args.concurrency, log, bar.update, args.seconds)
    report.write(result, args.json)
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
