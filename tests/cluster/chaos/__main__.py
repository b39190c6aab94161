"""`python -m tests.cluster.chaos`: prints its figures as JSON; exit code 1 when something was lost, wrong or leaked."""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
import tempfile
from pathlib import Path

from serving.commands.bench import report
from tests.cluster.chaos.elastic import elastic
from tests.cluster.chaos.run import run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.cluster.chaos", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0, help="so long faults are drawn")
    parser.add_argument("--each", nargs="?", const="", metavar="FAULTS", help="instead: every fault once, one after "
                        "the other, or these alone, parted by commas")
    parser.add_argument("--elastic", action="store_true", help="instead: no faults; instances come and go")
    parser.add_argument("--roles", action="store_true", help="two instances compute prompts, two others answer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--json", help="write the result to this file as well")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    if args.elastic:
        result = asyncio.run(elastic(folder, args.seed, args.clients))
    else:
        seconds = args.seconds if args.each is None else None
        result = asyncio.run(run(folder, args.seed, seconds, args.clients, fault=args.each, has_roles=args.roles))
    report.write(result, args.json)
    if result["problems"]:
        print(f"logs are in {folder}", file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
