"""`xllm serve` for another command of ours: it ends as if by SIGTERM when its stdin does.

The command that starts it keeps the other end of a pipe open for as long as it lives, so that a killed one leaves no
server behind.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

from serving.commands.cli import main


def end_with_owner() -> None:
    """End this process as if by SIGTERM when its stdin ends: whoever started it is gone, or wants it to end."""
    threading.Thread(target=_watch, name="parent-watch", daemon=True).start()


def _watch() -> None:
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    end_with_owner()
    sys.exit(main(["serve", *sys.argv[1:]]))
