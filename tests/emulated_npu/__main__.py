"""`install` puts the wheel in place, `run CMD...` runs a command with an emulated `npu:0`, `reason` says why it cannot.

On a machine that cannot have one, `install` and `run` print why and succeed: nothing is run.
"""

from __future__ import annotations

import os
import sys

from tests.emulated_npu import environment
from tests.emulated_npu.wheel import install, reason, unsupported


def main(arguments: list[str]) -> int:
    command = arguments[0] if arguments else ""
    if command == "reason":
        print(reason() or "")
    elif command in ("install", "run") and (why_not := unsupported()) is not None:
        print(f"SKIPPED, no emulated NPU here: {why_not}")
    elif command == "install":
        install()
    elif command == "run" and arguments[1:]:
        os.environ.update(environment())
        os.execvp(arguments[1], arguments[1:])
    else:
        print(__doc__, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
