"""`xllm cluster up` for a benchmark, which ends as if by SIGTERM when its stdin does: `python -m
benchmarks.owned_cluster [--device DEVICE_FILE] FLAG...`.

--device: its instances have no model, their steps take what the file says (`role_instance.py`).
"""

from __future__ import annotations

import sys

from serving.commands.cli import main
from serving.commands.instance_process import InstanceProcess
from serving.commands.owned_server import end_with_owner


def run(argv: list[str]) -> int:
    """Returns the exit code."""
    end_with_owner()
    if argv[:1] == ["--device"]:
        InstanceProcess.command = ("benchmarks.role_instance", argv[1])
        argv = argv[2:]
    return main(["cluster", "up", *argv])


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
