"""The `xllm` command, also as `python -m xllm`. `xllm` is imported first and checks that `serving` is its own."""

from __future__ import annotations

import sys

from serving.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
